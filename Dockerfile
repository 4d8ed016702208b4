# Both commands in a container: docker build -t mefem . && docker run --rm -it mefem make reproduce   (or make test, make lab)
FROM python:3.11-slim-bookworm
RUN apt-get update && apt-get install -y --no-install-recommends git make libgl1 libegl1 libgles2 libglib2.0-0 libxcb1 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /mefem
# The environment first: it is made again only when what is to be installed changes.
COPY Makefile constraints.txt settings.ini setup.py pyproject.toml README.md ./
COPY tools tools
COPY mefem mefem
RUN make env
COPY . .
CMD ["make", "reproduce"]
