#!/usr/bin/env bash
# Create .venv, install manic, and build the documentation as a site in build/site; a warning is an error. The site
# loads nothing from the network. Pass options of sphinx-build: bash launch/docs.sh --fresh-env
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh" site
.venv/bin/sphinx-build --fail-on-warning --keep-going --quiet -b html -d build/doctrees "$@" docs build/site
echo "open build/site/index.html"
