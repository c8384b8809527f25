#!/bin/bash
# One grid on this checkout: workflow/run.sh [options of snakemake]
#
#   workflow/run.sh                                         local cores
#   workflow/run.sh --profile workflow/profiles/slurm       a cluster
#   workflow/run.sh --configfile mine.yml                   your own grid
#
# Started again after a kill, it goes on. The lock dies with its holder, however that dies: where it is free, a lock that
# Snakemake left behind is stale and is removed.
set -eu
cd "$(dirname "$0")/.."
PATH=$PWD/.venv-grid/bin:$PATH
command -v snakemake >/dev/null || { echo "run.sh: no snakemake here; book/grid.md has the line that installs it" >&2; exit 2; }
mkdir -p .snakemake
exec 9>>.snakemake/head.lock
flock -n 9 || { echo "run.sh: another grid runs in this checkout; wait for it, or start from a second checkout" >&2; exit 1; }

arguments=(--snakefile workflow/Snakefile "$@")
[[ " $* " == *" --profile "* ]] || arguments+=(--profile workflow/profiles/local)
if [ -n "$(ls -A .snakemake/locks 2>/dev/null)" ]; then
  snakemake "${arguments[@]}" --unlock
fi
exec snakemake "${arguments[@]}"
