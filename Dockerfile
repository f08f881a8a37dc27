# The server in an image. For a GPU:
#   docker build --build-arg LOCK=requirements/t4-v100-a10.txt -t gptjet .
#   docker run --gpus all -p 50051:50051 -v /path/to/model:/model:ro gptjet --model /model
# Without --build-arg it is the CPU lock, whose torch is whatever build pip finds for 2.13.0.
#
# State: written to the reference, not built by CI, which has no Docker engine. The CUDA libraries
# come with the torch wheels, so the host needs the driver and the container toolkit only.

FROM python:3.11-slim-bookworm AS build
WORKDIR /src
RUN python -m venv /opt/gptjet
ENV PATH=/opt/gptjet/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
ARG LOCK=requirements/cpu.txt
# Dependencies before code: this layer changes with the lock alone.
COPY requirements requirements
RUN pip install -r requirements/build.txt && pip install -r "$LOCK"
COPY pyproject.toml README.md LICENSE ./
COPY proto proto
COPY service service
COPY kernels kernels
COPY benchmarks benchmarks
RUN pip install --no-deps --no-build-isolation .

FROM python:3.11-slim-bookworm
# Triton builds its launchers with a C compiler at first use; Python's headers are in this image.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 10001 gptjet
COPY --from=build /opt/gptjet /opt/gptjet
ENV PATH=/opt/gptjet/bin:$PATH PYTHONUNBUFFERED=1 GPTJET_HOST=0.0.0.0 GPTJET_LOG_FORMAT=json
USER gptjet
WORKDIR /home/gptjet
EXPOSE 50051
# Loading a 6B model from a cold disk takes minutes; `models` answers while it loads.
HEALTHCHECK --interval=15s --timeout=10s --start-period=60s --retries=3 \
    CMD ["gptjet", "models", "--server", "127.0.0.1:50051", "--timeout", "5"]
# SIGTERM drains: running requests finish within grace_s. Give `docker stop -t` more than that.
STOPSIGNAL SIGTERM
ENTRYPOINT ["gptjet", "serve"]
