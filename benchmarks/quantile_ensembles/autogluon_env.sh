#!/bin/sh
# Make a virtual environment for AutoGluon, outside the repository.
#
# Run: sh benchmarks/quantile_ensembles/autogluon_env.sh FOLDER
#
# torch comes first, in the release this benchmark used, so that the rest is satisfied with it. Where the
# package index serves it with CUDA (the usual one on Linux does, at several gigabytes), point pip at
# PyTorch's CPU builds for this one step. Ray is left out: with one core AutoGluon fits folds in turn.
set -eu
folder=${1:?usage: autogluon_env.sh FOLDER}
"${PYTHON:-python3.11}" -m venv "$folder"
pip="$folder/bin/python -m pip --quiet --disable-pip-version-check"
$pip install "torch==2.13.0"
$pip install "torch==2.13.0" "autogluon.tabular[lightgbm,catboost,fastai]==1.6.3" \
  "lightgbm==4.7.0" "catboost==1.2.10" "fastai==2.8.7" "scikit-learn==1.9.1" "numpy==2.4.6" "pandas==2.3.3"
$pip check
