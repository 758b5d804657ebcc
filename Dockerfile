# iddpm in a container. Not built by the tests: no container engine is at hand there.
#   docker build -t iddpm .                                       torch as pip finds it: on Linux, for CUDA
#   docker build -t iddpm --build-arg TORCH_INDEX=URL .           of another index, as pytorch.org names them for CPU and CUDA
#   docker run --rm -v "$PWD:/work" iddpm train my_photos --time 8h          (--gpus all --shm-size 8g on CUDA)
# It runs as user 1000, so that what it writes is yours; torch counts the cores that the container may use.
FROM python:3.11-slim

ARG TORCH_INDEX=""
ARG EXTRAS=metrics,tensorboard

WORKDIR /opt/iddpm
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir --constraint constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch \
 && pip install --no-cache-dir --constraint constraints.txt ".[${EXTRAS}]"

RUN useradd --uid 1000 --create-home user
USER user
WORKDIR /work
ENTRYPOINT ["iddpm"]
