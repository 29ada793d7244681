#!/usr/bin/env bash
# Builds images: `images/build.sh cpu gpu mlflow`. `make images` calls it; images/README.md has the
# settings, which are environment variables.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${BIN:-.venv/bin}/python
version=$("$python" -c 'from components.image import VERSION; print(VERSION)')
# Tells `python -m pipelines run --image` whether an image holds the code that is here.
sources=$("$python" -c 'from pipelines.distillation import source_version; print(source_version())')
read -ra options <<< "${BUILD_OPTIONS:-}"

for kind in "$@"; do
    base=${BASE_IMAGE:-}
    if [ "$kind" = gpu ]; then base=${GPU_BASE_IMAGE:-}; fi
    "${BUILDER:-docker}" build --file "images/$kind.Dockerfile" \
        ${base:+--build-arg "BASE_IMAGE=$base"} \
        --build-arg "VERSION=$version" --build-arg "SOURCES=$sources" \
        ${options[@]+"${options[@]}"} \
        --tag "${REGISTRY:+${REGISTRY%/}/}flagscale-distillation:$version-$kind" .
done
