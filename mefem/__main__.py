"""`python -m mefem` is the command `mefem`; torchrun needs a module to start."""

from mefem.cli import app

if __name__ == "__main__":
    app(prog_name="mefem")
