# lmcore with everything that it needs; your text and the runs are mounted, not copied.
#
#   docker build -t lmcore .                                    for NVIDIA GPUs
#   docker build -t lmcore:cpu --build-arg DEVICE=cpu .         without CUDA: much smaller
#   docker run --rm -it --gpus all --shm-size 8g -v "$PWD:/workspace" lmcore
#
# `make docker-build` and `make docker-shell` say the same shorter.

FROM python:3.11-slim-bookworm

# cuda or cpu. The CUDA wheels of torch bring their own CUDA libraries, so the image needs no other; only the driver
# must be on the host.
ARG DEVICE=cuda

# A compiler: torch.compile and DeepSpeed build their kernels at run time. tini: a training that is process 1 would
# not get the signals' default actions, and nobody would collect orphans.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential tini \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/lmcore

# Dependencies first: they change seldom, and this layer is the big one. torch is pinned by requirements.txt; the CPU
# build differs only in the index that it comes from.
COPY requirements.txt ./
# hadolint ignore=DL3013
RUN torch="$(grep '^torch==' requirements.txt)" \
    && if [ "$DEVICE" = cpu ]; then \
         pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu "$torch"; \
       else \
         pip install --no-cache-dir "$torch"; \
       fi \
    && pip install --no-cache-dir -r requirements.txt

# Extras of pyproject.toml by name, with commas between: EXTRAS=s3 for a bucket.
ARG EXTRAS=
COPY . .
RUN pip install --no-cache-dir --no-deps . \
    && if [ -n "$EXTRAS" ]; then pip install --no-cache-dir "lmcore[$EXTRAS]"; fi

# Not root: what a run writes into the mounted folder should belong to a person. `docker run --user` overrides it;
# HOME is writable by anyone for that reason (caches of torch, triton and the Hub).
RUN useradd --create-home --uid 1000 lmcore \
    && mkdir -p /workspace && chown lmcore:lmcore /workspace && chmod 1777 /home/lmcore
USER 1000
ENV HOME=/home/lmcore PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1

WORKDIR /workspace
ENTRYPOINT ["tini", "-g", "--"]
CMD ["bash"]
