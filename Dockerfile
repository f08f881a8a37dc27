# The server in an image.
#   docker build -t gptjet .                                        on a CPU
#   docker build --build-arg LOCK=requirements/hopper.txt -t gptjet .        on an H100
#   docker build --build-arg LOCK=requirements/t4-v100-a10.txt --build-arg ARCH=sm_75 -t gptjet .
#                                           on a T4, with GPT-J-6B's kernels compiled into the image
#   docker build --target deepspeed-sm70-sm75 -t gptjet .           T4, V100; DeepSpeed's op prebuilt
#   docker build --target deepspeed-sm80-sm86-sm90 -t gptjet .      A100, A10, H100; the same
#   docker run --gpus all -p 50051:50051 -v /path/to/model:/model:ro gptjet --model /model
# The CPU lock's torch is whatever build pip finds for 2.13.0.
#
# State: written to the reference, not built by CI, which has no Docker engine. Its stages are read
# by tests/test_dockerfile.py. The CUDA libraries come with the torch wheels, so the host needs the
# driver and the container toolkit only.

# ---- what every image runs in --------------------------------------------------------------------

FROM python:3.11-slim-bookworm AS runtime
# Triton builds its launchers with a C compiler at first use; Python's headers are in this image.
# So the first start on a card compiles its kernels, a minute or more, unless ARCH had them compiled
# when the image was built. `gptjet doctor` says how many compiled kernels it finds.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 10001 gptjet
ENV PATH=/opt/gptjet/bin:$PATH PYTHONUNBUFFERED=1 GPTJET_HOST=0.0.0.0 GPTJET_LOG_FORMAT=json
USER gptjet
WORKDIR /home/gptjet
EXPOSE 50051
# NOT_SERVING until the model is loaded, which takes a 6B model minutes from a cold disk: give
# `docker run --health-start-period` what yours takes. GPTJET_SERVER names another port.
# With a tokens file: `-e GPTJET_OPEN_HEALTH=true`, or a token for the probe in GPTJET_TOKEN. With TLS:
# `--health-cmd 'gptjet models --health --timeout 5 --tls-ca …'`.
HEALTHCHECK --interval=15s --timeout=10s --start-period=60s --retries=3 \
    CMD ["gptjet", "models", "--health", "--timeout", "5"]
# SIGTERM drains: running requests finish within grace_s. Give `docker stop -t` more than that.
STOPSIGNAL SIGTERM
ENTRYPOINT ["gptjet", "serve"]

# ---- with DeepSpeed's transformer_inference op prebuilt ------------------------------------------

# CUDA 12.6 is the newest toolkit line that still compiles for sm_70 and agrees with torch 2.10.0
# (CUDA 12.8: DeepSpeed accepts another minor version of 12). No GPU is needed to build.
FROM python:3.11-bookworm AS deepspeed-build
COPY --from=nvidia/cuda:12.6.3-devel-ubuntu22.04 /usr/local/cuda-12.6 /usr/local/cuda-12.6
WORKDIR /src
RUN python -m venv /opt/gptjet
ENV PATH=/opt/gptjet/bin:/usr/local/cuda-12.6/bin:$PATH CUDA_HOME=/usr/local/cuda-12.6 \
    PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY requirements requirements
RUN pip install -r requirements/build.txt && pip install -r requirements/t4-v100-a10.txt
# This op alone, for CUDA although no card is there to be seen. TORCH_CUDA_ARCH_LIST must be set:
# DeepSpeed's own list skips 7.5, and without a list it passes nvcc no arguments at all.
ENV DS_BUILD_OPS=0 DS_BUILD_TRANSFORMER_INFERENCE=1 DS_ACCELERATOR=cuda

# Apart from the newer cards because any architecture up to 7.x in the list leaves out the bf16 code.
FROM deepspeed-build AS deepspeed-build-sm70-sm75
ENV TORCH_CUDA_ARCH_LIST="7.0;7.5"
RUN pip install --no-build-isolation -r requirements/deepspeed.txt
COPY . .
RUN pip install --no-deps --no-build-isolation .

FROM deepspeed-build AS deepspeed-build-sm80-sm86-sm90
ENV TORCH_CUDA_ARCH_LIST="8.0;8.6;9.0+PTX"
RUN pip install --no-build-isolation -r requirements/deepspeed.txt
COPY . .
RUN pip install --no-deps --no-build-isolation .

FROM runtime AS deepspeed-sm70-sm75
COPY --from=deepspeed-build-sm70-sm75 /opt/gptjet /opt/gptjet
ENV GPTJET_BACKEND=deepspeed

FROM runtime AS deepspeed-sm80-sm86-sm90
COPY --from=deepspeed-build-sm80-sm86-sm90 /opt/gptjet /opt/gptjet
ENV GPTJET_BACKEND=deepspeed

# ---- without it: the default ---------------------------------------------------------------------

FROM python:3.11-slim-bookworm AS build
WORKDIR /src
RUN python -m venv /opt/gptjet
ENV PATH=/opt/gptjet/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
ARG LOCK=requirements/cpu.txt
# Dependencies before code: this layer changes with the lock alone.
COPY requirements requirements
RUN pip install -r requirements/build.txt && pip install -r "$LOCK"
COPY . .
RUN pip install --no-deps --no-build-isolation .

# ARCH="sm_75" or "sm_80 sm_86"; empty: nothing is compiled. No GPU is needed. WARM_FLAGS are further
# ones of `gptjet warm-cache`: "--dtype int8", "--model" with a folder that the stage has.
FROM build AS warm
ARG ARCH=
ARG WARM_FLAGS=
# Where the server will look: the files hold the path.
RUN mkdir /opt/kernels && if [ -n "$ARCH" ]; then \
    apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
    && gptjet warm-cache $(printf -- '--arch %s ' $ARCH) --cache-dir /opt/kernels $WARM_FLAGS; fi

FROM runtime
COPY --from=build /opt/gptjet /opt/gptjet
# The server's own, as Triton adds what it does not find.
COPY --from=warm --chown=gptjet:gptjet /opt/kernels /opt/kernels
ENV TRITON_CACHE_DIR=/opt/kernels
