# What the tests of the launchers share: fakes on PATH, jobs to launch, and what they claim of the calls that were made.
# shellcheck shell=bash disable=SC2154,SC2034 # bats sets status, output and stderr; tests read code

bats_require_minimum_version 1.5.0
ROOT=$(cd "$BATS_TEST_DIRNAME/../.." && pwd)
PYTHON=${PYTHON:-python3}
export PYTHON

common_setup_file() {
  mkdir -p "$BATS_FILE_TMPDIR/plans"
  "$PYTHON" "$BATS_TEST_DIRNAME/plan_for.py" "$ROOT/launch/jobs/biomed.yaml" >"$BATS_FILE_TMPDIR/plans/biomed.json"
}

common_setup() {
  cd "$ROOT" || return
  export FAKE=$BATS_TEST_TMPDIR
  mkdir "$FAKE/bin"
  forget
  local tool
  for tool in gcloud xpk kubectl sky srun scontrol sleep; do ln -s "$BATS_TEST_DIRNAME/fake" "$FAKE/bin/$tool"; done
  PATH=$FAKE/bin:$PATH
  JOB=$FAKE/job.yaml
  job biomed
}

job() { # job NAME [KEY: VALUE]...: the job of this name, with keys replaced, in $JOB
  local line
  { cat "$ROOT/launch/jobs/$1.yaml" && echo && echo "plans: x"; } >"$JOB"
  shift
  for line in "plans: $BATS_FILE_TMPDIR/plans" "$@"; do
    sed -i "/^${line%%:*}:/d" "$JOB"
    printf '%s\n' "$line" >>"$JOB"
  done
}

set_also() { # set_also K=V...: overrides of the job's config
  local override
  for override; do sed -i "s/^set:.*/&\n  - $override/" "$JOB"; done
}

fall_back() { # fall_back [KEY: VALUE]...: biomed's job with another slice to try, and plans for both
  job biomed 'fallbacks: [v5p:2x4x4]' "$@"
  mkdir "$FAKE/both"
  "$PYTHON" "$BATS_TEST_DIRNAME/plan_for.py" "$JOB" >"$FAKE/both/one.json"
  "$PYTHON" "$BATS_TEST_DIRNAME/plan_for.py" "$JOB" --fallback >"$FAKE/both/two.json"
  sed -i "s|^plans:.*|plans: $FAKE/both|" "$JOB"
}

plan_too() { # plan_too [--too-big]: a plan for the job as it is now
  "$PYTHON" "$BATS_TEST_DIRNAME/plan_for.py" "$JOB" "$@" >"$FAKE/plan.json"
  mkdir "$FAKE/plans"
  mv "$FAKE/plan.json" "$FAKE/plans"
  sed -i "s|^plans:.*|plans: $FAKE/plans|" "$JOB"
}

answer() { # answer PATTERN STATUS [TEXT]: in turn, where several patterns match; the last one stays
  printf '%s\t%s\t%s\n' "$1" "$2" "${3:-}" >>"$FAKE/answers"
}

forget() { # the calls so far, and what was to be answered
  : >"$FAKE/calls"
  : >"$FAKE/answers"
}

called() { # called PATTERN: how often
  local line count=0
  # shellcheck disable=SC2053
  while read -r line; do if [[ $line == $1 ]]; then count=$((count + 1)); fi; done <"$FAKE/calls"
  echo "$count"
}

launch() { run --separate-stderr "$@"; }

signal_during() { # signal_during SIGNAL PATTERN LAUNCHER: sends it once PATTERN is called; the launcher's status is then in $code
  env --default-signal=INT "$3" "$JOB" 2>"$FAKE/stderr" &
  local launcher=$!
  code=0
  until [[ $(called "$2") == 1 ]]; do
    kill -0 "$launcher" || return
    /bin/sleep 0.1
  done
  kill "-$1" "$launcher"
  wait "$launcher" || code=$?
}

ends_with() { # ends_with STATUS WORDS: the status, and the last line of stderr has the words
  [[ $status == "$1" ]] || { printf 'status %s, expected %s\n%s\n%s\n' "$status" "$1" "$output" "$stderr" && return 1; }
  [[ ${stderr##*$'\n'} == *"$2"* ]] || { printf 'expected %s in:\n%s\n' "$2" "$stderr" && return 1; }
}

refused() { # refused STATUS WORDS: so, in one line
  ends_with "$1" "$2" || return
  [[ $stderr != *$'\n'* && -z $output ]] || { printf 'more than one line:\n%s\n%s\n' "$output" "$stderr" && return 1; }
}

# In a dry run nothing is called, and what is printed is, typed into a shell, what the launch calls.
same_as_dry_run() { # same_as_dry_run LAUNCHER
  launch "$@" "$JOB" --dry-run
  [[ $status == 0 && -z $(<"$FAKE/calls") ]] || { echo "called: $(<"$FAKE/calls")" && return 1; }
  printf '%s\n' "$output" >"$FAKE/printed"
  bash "$FAKE/printed" >/dev/null 2>&1
  mv "$FAKE/calls" "$FAKE/typed"
  : >"$FAKE/calls"
}
