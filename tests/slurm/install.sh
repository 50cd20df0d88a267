#!/bin/sh
# Install what the Slurm tests need: Debian's or Ubuntu's own packages. Starts no daemon, asks nothing, and does
# nothing (with a word, and success) where it is not root or there is no apt: the tests are skipped there.
set -u
missing=
for program in slurmctld slurmd sbatch munged ip shellcheck; do
  PATH=/usr/sbin:/sbin:$PATH command -v "$program" >/dev/null 2>&1 || missing="$missing $program"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
  echo "not installed (needs root and apt):$missing; the Slurm tests will be skipped" >&2
  exit 0
fi
policy=/usr/sbin/policy-rc.d # its code 101 keeps the packages from starting their daemons
if [ ! -e "$policy" ]; then
  printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy"
  trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
packages="slurmctld slurmd slurm-client munge iproute2 shellcheck"
# shellcheck disable=SC2086
{ apt-get update -qq && apt-get install -y -qq --no-install-recommends $packages; } >/dev/null ||
  echo "apt could not install $packages; the Slurm tests will be skipped" >&2
exit 0
