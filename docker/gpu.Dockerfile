# docker build -f docker/gpu.Dockerfile -t qurl:gpu .
# docker run --rm -it --gpus all --shm-size 32g qurl:gpu qurl doctor
# Several nodes with InfiniBand: add --network host --ulimit memlock=-1 --cap-add IPC_LOCK --device /dev/infiniband
# CUDA 13 needs NVIDIA's driver 580 or newer on the host.
# The development image: FlashInfer compiles kernels with nvcc at run time.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04
# gpu.lock is resolved for Python 3.11, which Ubuntu 24.04 has from the deadsnakes archive. NCCL loads libibverbs and librdmacm;
# without them it falls back to TCP.
RUN apt-get update \
    && apt-get install -y --no-install-recommends software-properties-common \
    && add-apt-repository -y ppa:deadsnakes/ppa \
    && apt-get install -y --no-install-recommends \
        g++ git ibverbs-providers libibverbs1 libnuma1 librdmacm1 make python3.11 python3.11-dev python3.11-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/qurl
COPY requirements requirements
RUN python3.11 -m venv .venv && .venv/bin/pip install --no-cache-dir --no-deps -r requirements/gpu.lock
COPY . .
RUN .venv/bin/pip install --no-cache-dir --no-deps --no-build-isolation -e .
ENV PATH=/opt/qurl/.venv/bin:$PATH
CMD ["qurl", "doctor"]
