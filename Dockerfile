# A slim image in whose build both commands of the README run:  docker build -t repro-gpt2 .
# Then:  docker run --rm repro-gpt2 python scripts/sample.py -m runs/quickstart --prompt "Return a list of"
FROM python:3.12-slim
WORKDIR /repro-gpt2
COPY . .
ENV PATH=/repro-gpt2/.venv/bin:$PATH PIP_NO_CACHE_DIR=1
# With a package registry of your own: docker build --build-arg PIP_INDEX_URL=https://... (pip reads it).
ARG PIP_INDEX_URL PIP_EXTRA_INDEX_URL
RUN bash scripts/test.sh
RUN bash scripts/quickstart.sh
CMD ["bash"]
