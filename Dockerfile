# The image that Ray head and worker nodes run.
#
#   docker build -t maps-ray .                                                                  CPU
#   docker build -t maps-ray --build-arg BASE_IMAGE=nvidia/cuda:13.0.1-runtime-ubuntu24.04 .    NVIDIA GPU
#   docker build -t maps-ray-simulators --target simulators .                   with LIBERO, for rollouts in runs
#
# `ray up` copies files into the container with rsync, under the user id 1000 of the machines' login user.
# Both bases carry Python 3.12. PyTorch brings its own CUDA libraries; the CUDA base adds the driver hooks.
ARG BASE_IMAGE=ubuntu:24.04
FROM ${BASE_IMAGE} AS nodes

RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-pip python3-venv git ca-certificates rsync \
    && rm -rf /var/lib/apt/lists/* \
    && if id ubuntu; then userdel --remove ubuntu; fi \
    && useradd --uid 1000 --create-home --shell /bin/bash maps

WORKDIR /home/maps/maps_ray
RUN chown maps:maps .
USER maps
ENV PATH=/home/maps/venv/bin:$PATH PYTHONUNBUFFERED=1

# The dependencies change less often than the code: they make a layer of their own.
COPY --chown=maps:maps pyproject.toml constraints.txt ./
RUN python3 -m venv /home/maps/venv \
    && mkdir maps_ray && touch README.md maps_ray/__init__.py \
    && pip install --no-cache-dir --constraint constraints.txt . \
    && pip uninstall --yes maps_ray

COPY --chown=maps:maps . .
RUN pip install --no-cache-dir --no-deps --editable .

ENTRYPOINT []
CMD ["maps-ray", "--help"]

# LIBERO with its assets, and OpenGL without a display: OSMesa on the CPU, EGL where the driver of a GPU brings it.
FROM nodes AS simulators
USER root
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libosmesa6 libegl1 libgl1 libglib2.0-0t64 \
    && rm -rf /var/lib/apt/lists/*
USER maps
RUN pip install --no-cache-dir --constraint constraints.txt --editable '.[libero]'

# What is built without --target.
FROM nodes
