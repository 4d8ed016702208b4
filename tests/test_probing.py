"""The heads against PyTorch's own layers.

The batched grid against separate runs, and the rules on who may be where."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import mefem.probing as probing
from mefem.features import Features
from mefem.files import write_json
from mefem.probing import (
    CELEBA_ATTRIBUTES,
    LOSSES,
    TASKS,
    AttentivePooler,
    Candidate,
    JoinedRows,
    LinearProbe,
    MLPProbe,
    PersonLeak,
    Recipe,
    Split,
    StackedLinear,
    Task,
    TokenStore,
    TooFewLabels,
    answers_of,
    bare_norm,
    check_split,
    class_shares,
    join_features,
    make_splits,
    person_folds,
    probe,
    stacked_adamw,
    task_features,
    task_targets,
    train_heads,
)


def hand_set(head, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.4 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return head


def reference(head, c, x):
    """Copy c of a pooler, by PyTorch's attention, layer norms and linear layers."""
    dim, heads = head.dim, head.heads
    attention = nn.MultiheadAttention(dim, heads, batch_first=True, dtype=x.dtype)
    layers = [head.to_query, head.to_key, head.to_value]
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.cat([layer.weight[c].T for layer in layers]))
        attention.in_proj_bias.copy_(torch.cat([layer.bias[c, 0] for layer in layers]))
        attention.out_proj.weight.copy_(torch.eye(dim))
        attention.out_proj.bias.zero_()

    def norm(layer, y):
        return nn.functional.layer_norm(y, (dim,), layer.scale[c, 0], layer.shift[c, 0])

    def linear(layer, y):
        return nn.functional.linear(y, layer.weight[c].T, layer.bias[c, 0])

    q, tokens = head.query[c].expand(len(x), 1, dim), norm(head.norm_tokens, x)
    y = q + attention(q, tokens, tokens, need_weights=False)[0]
    y = y + linear(head.contract, nn.functional.gelu(linear(head.expand, norm(head.norm_query, y))))
    return linear(head.head, y)[:, 0]


@pytest.mark.parametrize("dim, heads, tokens, outputs", [(16, 1, 3, 1), (24, 3, 7, 9), (32, 8, 1, 2)])
def test_pooler_is_the_plain_formula(dim, heads, tokens, outputs):
    head = hand_set(AttentivePooler(dim, heads, outputs, copies=3).double())
    x = torch.randn(5, tokens, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = head(x)
    assert found.shape == (3, 5, outputs)
    for c in range(3):
        assert torch.allclose(found[c], reference(head, c, x), atol=1e-11, rtol=0)


def test_pooler_by_hand():
    """Identity projections, a query along the first axis.

    Softmax weights and their mean can be written down."""
    head = AttentivePooler(2, 1, 1).double()
    with torch.no_grad():
        for p in head.parameters():
            p.zero_()
        head.norm_tokens.scale.fill_(1)
        head.query.copy_(torch.tensor([2.0, 0.0]))
        for layer in (head.to_query, head.to_key, head.to_value):
            layer.weight.copy_(torch.eye(2))
        head.head.weight.copy_(torch.tensor([[1.0], [10.0]]))
        head.head.bias.fill_(0.5)
    x = torch.tensor([[[3.0, 1.0], [0.0, 4.0]]], dtype=torch.float64)  # layer norm: (1, -1) and (-1, 1)
    u = 1 / (1 + 1e-5) ** 0.5
    v = 2 / (4 + 1e-5) ** 0.5
    a = np.exp(2 * u / 2**0.5) / (np.exp(2 * u / 2**0.5) + np.exp(-2 * v / 2**0.5))
    first, second = 2 + a * u - (1 - a) * v, -a * u + (1 - a) * v
    assert np.isclose(head(x).item(), first + 10 * second + 0.5, rtol=1e-12)


def test_pooler_gradients_are_those_of_the_plain_formula():
    head = hand_set(AttentivePooler(12, 3, 2, copies=2).double())
    x = torch.randn(4, 5, 12, dtype=torch.float64)
    wanted = [p for p in head.parameters() if p is not head.to_key.bias]
    ours = torch.autograd.grad(head(x).square().sum(), wanted)
    attention_free = []
    for c in range(
        2
    ):  # the reference copies weights into a module, so its gradient is taken by finite differences
        attention_free.append(reference(head, c, x).square().sum())
    base = torch.stack(attention_free).sum()
    rng = np.random.default_rng(0)
    for p, g in zip(wanted, ours, strict=True):
        i = tuple(int(rng.integers(s)) for s in p.shape)
        with torch.no_grad():
            p[i] += 1e-6
            moved = sum(reference(head, c, x).square().sum() for c in range(2))
            p[i] -= 1e-6
        assert np.isclose(((moved - base) / 1e-6).item(), g[i].item(), rtol=1e-3, atol=1e-4)


def test_perceptron_and_linear_probe():
    x = torch.randn(20, 6, dtype=torch.float64)
    for head in (MLPProbe(6, 5, 2).double(), LinearProbe(6, 2).double()):
        hand_set(head).scale_features([x])
        z = (x - x.mean(0)) / x.std(0, correction=0)
        if isinstance(head, MLPProbe):
            z = nn.functional.gelu(z @ head.expand.weight[0] + head.expand.bias[0])
        assert torch.allclose(head(x), z @ head.head.weight[0] + head.head.bias[0])


def test_constant_feature_is_harmless():
    head = LinearProbe(3, 1)
    head.scale_features([torch.tensor([[1.0, 5.0, 0.0], [2.0, 5.0, 0.0]])])
    assert torch.isfinite(head(torch.tensor([[1.0, 6.0, 1.0]]))).all()


@pytest.mark.parametrize("people, photos, folds", [(10, 1, 5), (53, 3, 5), (7, 2, 2)])
def test_folds_keep_people_whole_and_balanced(people, photos, folds):
    rng = np.random.default_rng(people)
    persons = rng.permutation(np.repeat(np.arange(people), photos)).astype(str)
    value = dict(zip(np.arange(people).astype(str), rng.gamma(2, 3, people), strict=True))
    targets = np.array([value[p] for p in persons])
    fold = person_folds(persons, targets, folds, seed=1)
    assert pd.Series(fold).groupby(persons).nunique().max() == 1 and set(fold) == set(range(folds))
    sizes = np.bincount([fold[persons == p][0] for p in set(persons)])
    assert np.ptp(sizes) <= 1
    ranked = sorted(value, key=value.get)  # each run of `folds` neighbours covers all folds
    of = dict(zip(persons, fold, strict=True))
    for start in range(0, people - folds + 1, folds):
        assert {of[p] for p in ranked[start : start + folds]} == set(range(folds))
    assert np.array_equal(fold, person_folds(persons, targets, folds, seed=1))
    with pytest.raises(ValueError, match="folds"):
        person_folds(persons, targets, people + 1)


def test_a_planted_person_is_refused():
    persons = ["ada", "ben", "cid", "dan", "ada"]
    for train, validation, test, parts in (
        ([0], [1], [4], "train and test"),
        ([0], [4], [1], "train and validation"),
        ([1], [0], [4], "validation and test"),
    ):
        with pytest.raises(PersonLeak, match=f"both {parts}.*ada"):
            check_split(persons, Split("official", *(np.array(v) for v in (train, validation, test))))
    labels = pd.DataFrame({"person": ["a", "b", "c", "d", "a"], "split": ["train"] * 4 + ["validation"]})
    task = Task("t", "d", "y", "regression", split="official")
    with pytest.raises(PersonLeak, match="'a'"):
        make_splits(labels, np.arange(5.0), task, validation=0.5)


def toy(n=120, k=5, d=8, signal=1.0, seed=0):
    rng = np.random.default_rng(seed)
    person = np.arange(n) // 2
    bmi = (26 + 5 * rng.standard_normal(n // 2))[person]
    tokens = rng.standard_normal((n, k, d)).astype(np.float16)
    tokens[:, :, 0] += (signal * (bmi - 26) / 5)[:, None].astype(np.float16)
    labels = pd.DataFrame(
        {
            "key": np.arange(n).astype(str),
            "person": person.astype(str),
            "bmi": bmi,
            "split": np.where(person % 4, "train", "validation"),
            "sex": np.where(bmi > 26, "male", "female"),
        }
    )
    return Features("present", tokens, labels, {"encoder": "toy", "has_cls": True, "heads": 2, "tokens": k})


QUICK = dict(folds=3, epochs=4, lrs=(3e-3, 1e-2), weight_decays=(0.0, 0.1), progress=False)


# ---- several data sets as one


def source_of(name, n=60, seed=0, **meta):
    """`toy` features whose keys and people are a source's own."""
    f = toy(n=n, seed=seed)
    f.labels["source"] = name
    f.labels["key"], f.labels["person"] = f"{name}_" + f.labels.key, f"{name}/" + f.labels.person
    f.meta.update(
        {"n": n, "state": "present", "encoder_hash": "e" * 12, "faces_hash": name, "simulated": False} | meta
    )
    return f


def test_joined_rows_are_the_concatenation_and_no_copy():
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal((n, 3, 4)).astype(np.float16) for n in (5, 0, 7, 1)]
    whole, joined = np.concatenate(parts), JoinedRows(parts)
    assert joined.shape == whole.shape and len(joined) == 13 and joined.dtype == np.float16
    for rows in (slice(0, 13), slice(4, 6), slice(3, 3), np.array([12, 0, 5, 4, 5]), np.arange(13)[::-1]):
        np.testing.assert_array_equal(joined[rows], whole[rows])
        np.testing.assert_array_equal(joined[:, 1:][rows], whole[:, 1:][rows])
        np.testing.assert_array_equal(joined[:, 0][rows], whole[:, 0][rows])
    with pytest.raises(IndexError):
        joined[2:, 1]
    parts[2][0] = 7.0  # seen through the join: what it holds are the arrays themselves
    assert (joined[5:6] == 7.0).all() and all(
        cut.base is part for cut, part in zip(joined[:, 1:].parts, parts, strict=True)
    )


@pytest.mark.parametrize("memory", [1 << 30, 0])
def test_a_probe_of_joined_sources_is_that_of_one_set_with_their_rows(memory):
    a, b = source_of("own", seed=1), source_of("mcd-rppg", seed=2)
    joined = join_features({"bmi": a, "mcd-rppg": b})
    assert isinstance(joined.tokens, JoinedRows)
    copied = Features("present", np.concatenate([a.tokens, b.tokens]), joined.labels, joined.meta)
    for feature_set in ("patches", "cls"):
        one, two = (
            probe(f, "bmi", feature_set, memory=memory, **QUICK).predictions for f in (joined, copied)
        )
        pd.testing.assert_frame_equal(one, two)
        assert one.groupby("source").key.nunique().to_dict() == {"own": 60, "mcd-rppg": 60}
        assert (one.source == one.key.str.partition("_")[0]).all()
        assert (
            one.groupby("person").fold.nunique().max() == 1
            and (one.groupby("source").fold.nunique() == 3).all()
        )


def test_labels_that_a_source_lacks_are_missing_there():
    a, b = source_of("own", seed=1), source_of("mcd-rppg", seed=2)
    del b.labels["sex"]
    b.labels.loc[:9, "bmi"] = np.nan
    joined = join_features({"bmi": a, "mcd-rppg": b})
    assert len(probe(joined, "bmi", "cls", **QUICK).predictions) == 110
    assert set(probe(joined, "bmi-sex", "cls", **QUICK).predictions.source) == {"own"}


def test_a_person_or_photograph_of_two_sources_is_refused():
    a, b = source_of("own"), source_of("mcd-rppg")
    b.labels.loc[3, "person"] = "own/5"
    with pytest.raises(PersonLeak, match="person 'own/5' is in several sources: mcd-rppg, own"):
        join_features({"bmi": a, "mcd-rppg": b})
    b = source_of("mcd-rppg")
    b.labels.loc[3, "key"] = "own_5"
    with pytest.raises(ValueError, match="key 'own_5' is in several sources"):
        join_features({"bmi": a, "mcd-rppg": b})
    with pytest.raises(
        ValueError, match="source 'mcd-rppg' is in several data sets: bmi, mcd-rppg"
    ):  # put into data/raw/bmi as well
        join_features({"bmi": source_of("mcd-rppg"), "mcd-rppg": source_of("mcd-rppg")})
    with pytest.raises(ValueError, match="bmi and mcd-rppg are of different encoders"):
        join_features({"bmi": a, "mcd-rppg": source_of("mcd-rppg", encoder_hash="f" * 12)})


def test_the_account_of_a_join_has_what_all_agree_on_and_every_part():
    a, b = source_of("own", simulated=True), source_of("mcd-rppg", n=30)
    meta = join_features({"bmi": a, "mcd-rppg": b}).meta
    assert meta["n"] == 90 and meta["dataset"] == "bmi+mcd-rppg" and meta["simulated"] is True
    assert meta["encoder_hash"] == "e" * 12 and "faces_hash" not in meta
    assert meta["parts"]["mcd-rppg"]["faces_hash"] == "mcd-rppg" and meta["parts"]["bmi"]["n"] == 60
    without = Features("data absent", None, None, {"state": "data absent", "reason": "no db.csv"})
    alone = join_features({"bmi": a, "mcd-rppg": without})
    assert (
        alone.tokens is a.tokens
        and alone.meta["faces_hash"] == "own"
        and alone.meta["parts"]["mcd-rppg"]["reason"] == "no db.csv"
    )
    assert set(probe(alone, "bmi", "cls", **QUICK).predictions.source) == {"own"}
    nothing = probe(join_features({"bmi": without, "mcd-rppg": without}), "bmi", "cls", **QUICK)
    assert nothing.state == "data absent" and nothing.info["reason"] == "bmi: no db.csv; mcd-rppg: no db.csv"


def test_task_features_are_those_on_disk(tmp_path):
    def write(name, f):
        np.save(tmp_path / f"{name}.npy", f.tokens)
        f.labels.to_parquet(tmp_path / f"{name}.parquet")
        write_json(tmp_path / f"{name}.json", f.meta)

    with pytest.raises(FileNotFoundError, match="bmi.json"):
        task_features(tmp_path, "bmi")
    write("mcd-rppg", source_of("mcd-rppg", n=40))
    assert set(task_features(tmp_path, "bmi").labels.source) == {"mcd-rppg"}
    write("bmi", source_of("own"))
    found = task_features(tmp_path, "bmi-age")
    assert len(found.tokens) == 100 and all(isinstance(part, np.memmap) for part in found.tokens.parts)
    assert task_features(tmp_path, "cholesterol").labels.source.unique().tolist() == ["mcd-rppg"]
    (tmp_path / "mcd-rppg.json").unlink()
    found = task_features(tmp_path, "bmi")
    assert found.meta["n"] == 60 and found.meta["parts"]["mcd-rppg"]["state"] == "no features"


@pytest.mark.parametrize("head", ["attentive", "mlp", "linear"])
def test_every_photograph_is_predicted_once_by_people_unseen(head):
    features = toy()
    result = probe(features, "bmi", "cls" if head != "attentive" else "patches", head=head, **QUICK)
    assert sorted(result.predictions.key) == sorted(features.labels.key)
    assert result.predictions.groupby("person").fold.nunique().max() == 1
    assert [len(s["validation"]) for s in result.info["splits"]] == [8] * 3  # 2 rates x 2 decays x 2 scalings


def test_repeatable_and_seeded():
    a, b, c = (probe(toy(), "bmi", "patches", seeds=(s,), **QUICK).predictions for s in (0, 0, 1))
    assert a.equals(b) and not np.allclose(a.sort_values("key").prediction, c.sort_values("key").prediction)


def test_candidates_side_by_side_equal_separate_runs_of_torch_adamw():
    x, y = torch.randn(48, 6, generator=torch.Generator().manual_seed(0)), torch.randn(48)
    grid = [Candidate(1e-2, 0.5), Candidate(3e-3, 0.0), Candidate(3e-3, 0.5)]
    head = MLPProbe(6, 5, 1, copies=3, generator=torch.Generator().manual_seed(1))
    start = [p.detach().clone() for p in head.parameters()]
    optimiser = stacked_adamw(head, grid)
    for _ in range(7):
        for p in head.parameters():
            p.grad.zero_()
        (head.predict(x)[..., 0] - y).square().mean(1).sum().backward()
        optimiser.step()
    for c, candidate in enumerate(grid):
        alone = MLPProbe(6, 5, 1)
        with torch.no_grad():
            for p, s in zip(alone.parameters(), start, strict=True):
                p.copy_(s[c : c + 1])
        weights = [p for n, p in alone.named_parameters() if n.endswith("weight")]
        biases = [p for n, p in alone.named_parameters() if n.endswith("bias")]
        plain = torch.optim.AdamW(
            [
                {"params": weights, "weight_decay": candidate.weight_decay},
                {"params": biases, "weight_decay": 0.0},
            ],
            lr=candidate.lr,
        )
        for _ in range(7):
            plain.zero_grad()
            (alone(x)[:, 0] - y).square().mean().backward()
            plain.step()
        for p, q in zip(head.parameters(), alone.parameters(), strict=True):
            assert torch.allclose(p[c], q[0], atol=1e-6)


def test_best_epoch_is_kept():
    f = toy(signal=0.3)
    head = AttentivePooler(8, 2, 1, copies=2, generator=torch.Generator().manual_seed(0))
    store = TokenStore(f.select("patches"), head.prepare)
    y = torch.as_tensor((f.labels.bmi.to_numpy() - 26) / 5).float()
    split = Split("s", np.arange(60), np.arange(60, 90), np.arange(90, 120))
    grid = (Candidate(3e-2, 0.0), Candidate(1e-3, 0.0))
    recipe = Recipe("attentive", grid, heads=2, hidden=0, epochs=12, batch=16, patience=6)
    info = train_heads(head, store, y, split, "regression", recipe)
    curve = np.array(info["curves"]["validation"])
    assert info["best_epoch"][0] < len(curve) - 1  # the fast candidate overfits, so the test means something
    with torch.no_grad():
        now = (head.predict(store[split.validation])[..., 0] - y[60:90]).square().mean(1)
    assert np.allclose(now, curve.min(0), atol=1e-6) and list(curve.argmin(0)) == info["best_epoch"]


def test_a_small_set_takes_smaller_batches():
    """18 steps on 700 photographs left a pooler at its initial weights: an epoch has `least_steps` steps."""
    sizes = {"batch": 4096, "least_steps": 9}, {"batch": 7, "least_steps": 1}  # 68 photographs: 7 a step
    a, b = (probe(toy(), "bmi", "patches", **(QUICK | size)) for size in sizes)
    assert {split["n"]["train"] // 9 for split in a.info["splits"]} == {7}
    assert np.array_equal(a.predictions.prediction, b.predictions.prediction)
    assert a.info["recipe"]["least_steps"] == 9


def test_test_people_influence_nothing():
    """Neither the scale of the targets nor the choice of a candidate may see the test part."""
    task = Task("t", "bmi", "bmi", "regression", split="official")
    f, g = toy(), toy()
    held = g.labels.split == "validation"
    g.labels.loc[held, "bmi"] = 1000.0
    a, b = (probe(x, task, "patches", **QUICK).predictions for x in (f, g))
    assert np.array_equal(a.prediction, b.prediction) and (b.target == 1000).all()


def test_streaming_gives_what_memory_gives(tmp_path):
    f = toy()
    np.save(tmp_path / "tokens.npy", f.tokens)
    f.tokens = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    a, b = (probe(f, "bmi", "patches+cls", memory=m, **QUICK).predictions for m in (1 << 30, 0))
    assert TokenStore(f.tokens, bare_norm, memory=0).kept is None
    assert np.allclose(a.prediction, b.prediction, atol=1e-4)


def test_classification_and_labels():
    result = probe(toy(signal=2.0), "bmi-sex", "patches", **(QUICK | {"epochs": 10}))
    assert (result.predictions.target == result.predictions.prediction).mean() > 0.75
    f = toy()
    f.labels.loc[3, "sex"] = "unknown"
    with pytest.raises(ValueError, match="'unknown'.*female"):
        probe(f, "bmi-sex", "cls", **QUICK)
    f.labels.loc[3, "sex"] = None
    result = probe(f, "bmi-sex", "cls", **QUICK)
    assert result.info["without_label"] == 1 and "3" not in set(result.predictions.key)
    with pytest.raises(ValueError, match="no column 'age'"):
        task_targets(f.labels, Task("a", "bmi", "age", "regression"))


def test_fairface_is_scored_by_group_on_the_official_split():
    f = toy()
    f.labels["age"] = np.arange(120) % 9
    f.labels["race_name"] = np.where(np.arange(120) % 3, "Black", "White")
    result = probe(f, "fairface-age", "cls", **QUICK).predictions
    assert set(result.key) == set(f.labels.key[f.labels.split == "validation"])
    assert set(result.group) == {"White", "non-White"}
    white = f.labels.set_index("key").race_name == "White"
    assert (white[result.key].to_numpy() == (result.group == "White").to_numpy()).all()


def test_absent_features_are_a_state_not_an_error():
    result = probe(
        Features("weights absent", None, None, {"reason": "no file", "encoder": "farl"}), "bmi", "cls"
    )
    assert (
        result.state == "weights absent" and result.info["reason"] == "no file" and result.predictions.empty
    )


@pytest.mark.parametrize("device", ["auto", "cpu", torch.device("cpu")])
def test_every_way_to_name_a_device(device):
    """The settings say "auto": a stage that hands them on as they are once ended here."""
    found = probe(toy(), "bmi", "cls", device=device, **(QUICK | {"epochs": 1})).predictions
    assert np.isfinite(found.prediction).all()


def test_the_settings_of_a_profile_are_what_probe_takes():
    from mefem.config import ProbingSettings

    settings = ProbingSettings(epochs=1, folds=2).model_dump()
    for name in ("bootstrap", "seed", "seeds"):
        del settings[name]
    assert len(probe(toy(), "bmi", "patches", progress=False, **settings).predictions) == 120


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="bmi, bmi-age"):
        probe(toy(), "weight", "cls")
    with pytest.raises(ValueError, match="'attentive', 'mlp'"):
        probe(toy(), "bmi", "cls", head="forest", **QUICK)
    with pytest.raises(ValueError, match="10 cannot be split into 3"):
        AttentivePooler(10, 3, 1)
    with pytest.raises(ValueError, match="share"):
        probe(toy(), "bmi", "cls", validation=0.9, progress=False)
    flat = toy()
    flat.labels["bmi"] = 20.0
    with pytest.raises(ValueError, match="all equal"):
        probe(flat, "bmi", "cls", **QUICK)


def test_copies_start_alike():
    layer = StackedLinear(4, 3, 2)
    assert all(torch.equal(layer.weight[0], layer.weight[c]) for c in range(4))


# -- attributes, rare classes, official splits
# --------------------------------------------------------------------------

QUIZ = Task("quiz", "toy", "answers", "multilabel", classes=("Bald", "Smiling"), split="official")


def quiz(**kwargs):
    """Two attributes, the first rare and written in the tokens, the second a coin; a split in three."""
    f = toy(n=600, **kwargs)
    rng = np.random.default_rng(5)
    bald = (rng.random(300) < 0.1).repeat(2)
    f.tokens[:, :, 1] += 3 * bald[:, None].astype(np.float16)
    f.labels["Bald"], f.labels["Smiling"] = bald, rng.random(600) < 0.5
    f.labels["split"] = np.select(
        [np.arange(600) < 400, np.arange(600) < 480], ["train", "validation"], "test"
    )
    return f


def test_attributes_are_predicted_at_once_on_the_official_split():
    f = quiz()
    result = probe(f, QUIZ, "patches", **(QUICK | {"epochs": 12}))
    p, split = result.predictions, result.info["splits"]
    assert len(split) == 1 and split[0]["n"] == {"train": 400, "validation": 80, "test": 120}
    assert sorted(p.key.unique()) == sorted(f.labels.key[f.labels.split == "test"]) and len(p) == 240
    wide = p.pivot(index="key", columns="label", values="target").loc[f.labels.key[480:]]
    assert np.array_equal(wide[["Bald", "Smiling"]], f.labels[["Bald", "Smiling"]][480:].astype(float))
    hit = (p.target == p.prediction).groupby(p.label, observed=True).mean()
    assert hit["Bald"] > 0.95 and 0.3 < hit["Smiling"] < 0.7


@pytest.mark.parametrize(
    "write",
    [lambda a: a, lambda a: a.astype(int), lambda a: 2 * a.astype(int) - 1, lambda a: a.astype(object)],
)
def test_attributes_as_their_publishers_write_them(write):
    labels = quiz().labels
    wanted = labels[["Bald", "Smiling"]].to_numpy(float)
    labels[["Bald", "Smiling"]] = labels[["Bald", "Smiling"]].apply(write)
    assert np.array_equal(task_targets(labels, QUIZ), wanted)


def test_attributes_that_are_missing_or_no_answer():
    f = quiz()
    f.labels["Bald"] = f.labels.Bald.astype(object)
    f.labels.loc[500, "Bald"] = None
    result = probe(f, QUIZ, "cls", **QUICK)
    assert result.info["without_label"] == 1 and "500" not in set(result.predictions.key)
    f.labels.loc[500, "Bald"] = "perhaps"
    with pytest.raises(ValueError, match="'perhaps' of column 'Bald'"):
        probe(f, QUIZ, "cls", **QUICK)
    with pytest.raises(ValueError, match="no column 'Smiling'"):
        probe(Features("present", f.tokens, f.labels.drop(columns="Smiling"), f.meta), QUIZ, "cls", **QUICK)
    f = quiz()
    f.labels.loc[599, "split"] = "val"
    with pytest.raises(ValueError, match="'val' in the column split"):
        probe(f, QUIZ, "cls", **QUICK)


def test_a_person_in_two_official_parts_is_refused():
    f = quiz()
    f.labels.loc[599, "person"] = f.labels.person[450]
    with pytest.raises(PersonLeak, match=f"validation and test.*'{f.labels.person[450]}'"):
        probe(f, QUIZ, "cls", **QUICK)


def test_binary_cross_entropy_is_torchs_for_each_copy():
    g = torch.Generator().manual_seed(0)
    logits, answers = torch.randn(3, 7, 4, generator=g), (torch.rand(7, 4, generator=g) < 0.5).float()
    wanted = torch.stack([nn.functional.binary_cross_entropy_with_logits(copy, answers) for copy in logits])
    assert torch.allclose(LOSSES["multilabel"](logits, answers), wanted)


def test_logit_adjustment_is_the_rule_of_bayes_for_equal_classes():
    """Two Gaussians at -1 and 1, the second one in fifty.

    Adjusted, the boundary must come back to the middle."""
    x = np.linspace(-3, 3, 601)
    shares = np.array([0.98, 0.02])
    logits = np.stack([np.log(shares[0]) - (x + 1) ** 2 / 2, np.log(shares[1]) - (x - 1) ** 2 / 2], axis=-1)
    found = answers_of(logits, "classification", shares)
    assert x[found["prediction"].argmax()] > 1.9 and abs(x[found["balanced"].argmax()]) < 0.011
    yes = (logits[:, 1] - logits[:, 0])[:, None]
    found = answers_of(yes, "multilabel", shares[1:])
    assert x[found["prediction"].argmax()] > 1.9 and abs(x[found["balanced"].argmax()]) < 0.011
    assert np.allclose(
        class_shares(np.array([[1, 0], [1, 0], [0, 0]]), 2), [3 / 5, 1 / 5]
    )  # one more of each


def test_rare_attributes_are_found_when_asked_for():
    p = probe(
        quiz(), QUIZ, "cls", **(QUICK | {"epochs": 3, "lrs": (1e-4,), "scalings": ("standardise",)})
    ).predictions  # too short to be sure of itself
    rare = p[(p.label == "Bald") & (p.target == 1)]
    assert (rare.balanced == 1).mean() > 0.8 > 0.5 > (rare.prediction == 1).mean()


def test_the_papers_tasks():
    assert len(set(CELEBA_ATTRIBUTES)) == 40 and {"Male", "Young", "5_o_Clock_Shadow", "No_Beard"} < set(
        CELEBA_ATTRIBUTES
    )
    assert TASKS["celeba"].outputs == 40 and TASKS["celeba"].split == "official"
    columns = {t.target: t.unit for t in TASKS.values() if t.dataset == "mcd-rppg"}
    assert columns == {
        "hemoglobin": "mmol/l",
        "glycated_hemoglobin": "%",
        "cholesterol": "mmol/l",
        "upper_ap": "mmHg",
        "lower_ap": "mmHg",
        "saturation": "%",
    }


def test_too_few_people_is_an_error_of_its_own():
    f = toy(n=6)
    for task, settings in (("bmi", {"folds": 5}), ("bmi-sex", {"folds": 4})):
        with pytest.raises(TooFewLabels):
            probe(f, task, "cls", **(QUICK | settings))


def test_heads_on_one_vector_see_the_mean_of_the_patches():
    f = toy()
    g = Features(
        "present",
        np.asarray(f.tokens[:, 1:], np.float32).mean(1, keepdims=True),
        f.labels,
        f.meta | {"tokens": 1},
    )
    a, b = (probe(x, "bmi", s, head="linear", **QUICK).predictions for x, s in ((f, "patches"), (g, "cls")))
    assert np.allclose(a.prediction, b.prediction, atol=1e-4)


MEMORY = """
import resource, sys
import numpy as np, pandas as pd
from mefem.features import Features
from mefem.files import write_json
from mefem.probing import probe

n, k, d = 200_000, 197, 768                                    # CelebA by a ViT-B: 60 GB
# a sparse file: only what is written takes space
tokens = np.lib.format.open_memmap(sys.argv[1], "w+", np.float16, (n, k, d))
labels = pd.DataFrame({"key": np.arange(n).astype(str), "person": np.arange(n).astype(str), "bmi": np.nan})
rows = np.arange(0, n, n // 60)[:60]
labels.loc[rows, "bmi"] = np.linspace(20, 30, 60)
for row in rows:
    tokens[row] = labels.bmi[row] / 10
tokens = np.load(sys.argv[1], mmap_mode="r")
used = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used + (1 << 30), used + (1 << 30)))   # one GiB more, not sixty
features = Features("present", tokens, labels, {"has_cls": True, "heads": 12, "tokens": k})
settings = dict(folds=2, epochs=1, batch=16, lrs=(1e-3,), weight_decays=(0.1,), validation=0.2)
print(len(probe(features, "bmi", "patches+cls", memory=64 << 20, **settings).predictions), "predicted")
try:
    probe(features, "bmi", "patches+cls", memory=1 << 40, progress=False, **settings)
except (MemoryError, RuntimeError):
    print("in memory it does not fit")
"""


def test_features_larger_than_memory(tmp_path):
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "tokens.npy")],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.stdout.splitlines() == ["60 predicted", "in memory it does not fit"], (
        done.stdout + done.stderr[-2000:]
    )


def skewed_tokens(n=40):
    """Tokens [n, 9, 12] whose features differ in scale, go together, and depend on the place."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(n, 9, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    return (
        mixed * torch.linspace(0.1, 3, 12) + torch.arange(12) + 5 * torch.randn(1, 9, 12, generator=generator)
    )


def test_feature_scalings_against_numpy():
    tokens = skewed_tokens()
    centre, found = probing.feature_scalings(tokens.split(7))
    x = tokens.double().numpy()
    assert np.allclose(centre, x.mean((0, 1)), atol=1e-5) and set(found) == set(probing.SCALINGS)
    assert np.allclose(found["standardise"], np.diag(1 / x.std((0, 1))), rtol=1e-4)
    away = ((x - x.mean(0)) / x.std((0, 1))).reshape(-1, 12)  # features in units of their deviations
    values, vectors = np.linalg.eigh(away.T @ away / len(away))
    whiten = found["whiten"].double().numpy()
    around = np.linalg.inv(away.T @ away / len(away) + 0.3 * values.mean() * np.eye(12))
    assert np.allclose(
        whiten @ whiten.T, around / np.outer(x.std((0, 1)), x.std((0, 1))), rtol=1e-3, atol=1e-6
    )
    seen = (away * x.std((0, 1))) @ whiten
    assert np.allclose(seen.T @ seen / len(seen), np.diag(values / (values + 0.3 * values.mean())), atol=1e-4)
    vectors = skewed_tokens()[:, 0]  # one vector a picture: its plain covariance
    seen = np.cov(
        (vectors @ probing.feature_scalings([vectors], floor=1e-9)[1]["whiten"]).double().numpy().T, bias=True
    )
    assert np.allclose(seen, np.eye(12), atol=1e-3)


def test_pooler_sees_tokens_as_its_start_has_them():
    tokens, scalings = skewed_tokens(), ["whiten", "standardise"]
    pooler = hand_set(AttentivePooler(12, 3, 1, copies=2))
    normed = pooler.prepare(tokens)
    pooler.scale_features(normed.split(7), scalings)
    centre, found = probing.feature_scalings([normed])
    for copy, start in enumerate(scalings):
        plain = AttentivePooler(12, 3, 1, copies=2)
        plain.load_state_dict(dict(pooler.named_parameters()) | dict(plain.named_buffers()))
        assert torch.allclose(
            pooler.predict(normed)[copy], plain.predict((normed - centre) @ found[start])[copy], atol=1e-4
        )


@pytest.mark.parametrize("head", [MLPProbe(12, 5, 1, copies=2), LinearProbe(12, 1, copies=2)])
def test_heads_on_one_vector_see_it_as_their_start_has_it(head):
    x = skewed_tokens()[:, 0]
    head.scale_features(x.split(7), ["standardise", "whiten"])
    plain, whitened = head.see(x)
    assert torch.allclose(plain, (x - x.mean(0)) / x.std(0, correction=0), atol=1e-4)
    values = torch.linalg.eigvalsh(torch.corrcoef(x.T))
    assert torch.allclose(
        torch.cov(whitened.T, correction=0).diagonal(), values / (values + 0.3 * values.mean()), atol=1e-3
    )
    assert head(x).shape == (2, 40, 1)


def test_a_feature_that_never_changes_is_only_shifted():
    x = torch.stack([torch.arange(6.0), torch.full((6,), 3.0)], -1)
    centre, found = probing.feature_scalings([x[:2], x[2:]])
    assert (
        centre[1] == 3
        and found["standardise"][1, 1] == 1
        and abs(found["standardise"][0, 0] * x[:, 0].std(correction=0) - 1) < 1e-6
    )
    assert torch.isfinite(found["whiten"]).all()
    assert torch.equal(probing.feature_scalings([torch.ones(4, 2)])[1]["whiten"].abs().sum(0), torch.ones(2))


def test_a_start_is_chosen_on_validation_people():
    """Every feature shows one thing that all pictures differ in most.

    The target lies in what is left: whitened, it is found sooner."""
    generator = torch.Generator().manual_seed(0)
    common, own = torch.randn(300, 1, generator=generator), torch.randn(300, 40, generator=generator)
    tokens, y = (common + 0.1 * own)[:, None].expand(-1, 4, -1).numpy(), own[:, :2].sum(1)
    split = Split("fold 0", np.arange(200), np.arange(200, 250), np.arange(250, 300))
    recipe = Recipe(
        "linear", tuple(Candidate(1e-2, 0.0, start) for start in probing.SCALINGS), 1, 8, 30, 32, 30
    )
    answer, account = probing.probe_split(
        y.numpy(), probing.get_task("bmi"), split, recipe, TokenStore(tokens, probing.mean_token)
    )
    assert (
        account["chosen"] == 1
        and account["validation"][1] < 0.5 * account["validation"][0]
        and np.corrcoef(answer["prediction"], y[250:])[0, 1] > 0.6
    )
