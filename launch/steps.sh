# shellcheck shell=bash
# What the launchers share; they source it. A launcher reads a job, checks it, and only then creates something, which it takes down
# again however it ends.

HERE=$(dirname "${BASH_SOURCE[0]}")
POLL=${POLL:-30} # seconds between looks at something that is not there yet

say() { printf '%s: %s\n' "$(basename "$0" .sh)" "$*" >&2; }
die() { # die STATUS WORD...
  local status=$1
  shift
  say "$*"
  exit "$status"
}

show() { # show COMMAND...: as one would type it
  local line='' word
  for word; do
    if [[ $word =~ ^[-A-Za-z0-9_./:=@%+,]+$ ]]; then line+=" $word"; else line+=" ${word@Q}"; fi
  done
  printf '%s\n' "${line# }"
}

# read_job ARGUMENT...: JOB.yaml [--dry-run]. Sets DRY_RUN and, from the job's file, JOB_OWNER and the rest, or says what is wrong with it.
read_job() {
  local file='' argument
  DRY_RUN=''
  for argument; do
    case $argument in
      --dry-run) DRY_RUN=yes ;;
      -h | --help)
        sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" # what stands at the launcher's top
        exit
        ;;
      -*) die 2 "unknown option $argument; expected JOB.yaml [--dry-run], or --help" ;;
      *)
        [[ -z $file ]] || die 2 "got $file and $argument; expected one job"
        file=$argument
        ;;
    esac
  done
  [[ -n $file ]] || die 2 "got no job; expected $0 launch/jobs/biomed.yaml [--dry-run]"
  JOB_FILE=$file
  choose 0
}

choose() { # choose NUMBER: the job on this one of its slices; 0 is the preferred one
  local variables
  variables=$("${PYTHON:-python3}" "$HERE/job.py" "$JOB_FILE" --launcher "$(basename "$0" .sh)" --choice "$1") || exit
  eval "$variables"
}

need() { # need COMMAND...: which a dry run does without
  local command
  for command; do
    [[ -n $DRY_RUN ]] || command -v "$command" >/dev/null || die 2 "there is no $command on PATH; docs/launching.md says where it comes from"
  done
}

COMPLAINTS=$(mktemp)

try() { # try COMMAND...: leaves its output in $answer and its complaint, as one line, in $complaint
  local status=0
  # shellcheck disable=SC2034 # for whoever called
  answer=$("$@" 2>"$COMPLAINTS") || status=$?
  complaint=$(tr -s '[:space:]' ' ' <"$COMPLAINTS")
  [[ -n ${complaint// /} ]] || complaint=$(tr -s '[:space:]' ' ' <<<"$answer") # XPK complains on stdout
  complaint=${complaint##*ERROR: }
  complaint=${complaint##* error: } # usage, of whatever length, comes before it
  complaint=${complaint% }
  complaint=${complaint:-no reason given}
  return "$status"
}

call() { # call WHAT COMMAND...: a failure ends the launch, with WHAT and the complaint; a dry run shows the command
  local what=$1
  shift
  if [[ -n $DRY_RUN ]]; then show "$@"; else try "$@" || die 1 "$what: $complaint"; fi
}

patiently() { # patiently COMMAND...: one that takes long, so that a signal is not kept waiting for it
  local status=0
  "$@" &
  CHILD=$!
  wait "$CHILD" || status=$?
  CHILD=''
  return "$status"
}

# The bucket, as the workers will see it. What is written is the job itself: a record of what was started.
check_bucket() {
  local as=--impersonate-service-account=$JOB_SERVICE_ACCOUNT may="$JOB_SERVICE_ACCOUNT needs roles/storage.objectUser on it"
  call "cannot list gs://$JOB_BUCKET ($may)" gcloud storage ls "gs://$JOB_BUCKET" "$as"
  call "cannot write to gs://$JOB_BUCKET ($may)" gcloud storage cp "$JOB_FILE" "$JOB_OUT.job.yaml" "$as"
}

RESTARTED=0
again() { # again WHY: waits before the next attempt, longer each time; gives up after as many as the job allows
  ((RESTARTED < JOB_RESTARTS)) || die 75 "$1; gave up after $RESTARTED restarts; start it again, and it goes on from $JOB_OUT"
  RESTARTED=$((RESTARTED + 1))
  local delay=$((RESTARTED < 6 ? 30 << (RESTARTED - 1) : 600))
  say "$1; restart $RESTARTED of $JOB_RESTARTS in $delay s, with the same run $JOB_OUT"
  patiently sleep "$delay"
}

# A launcher that creates something redefines this. It runs however the launch ends, a signal included.
clean_up() { :; }
finish() {
  local status=$?
  trap '' INT TERM HUP # a second Ctrl-C must not leave anything that costs
  trap - EXIT
  [[ -z ${CHILD:-} ]] || kill "$CHILD" 2>/dev/null || true
  clean_up "$status"
  rm -f "$COMPLAINTS"
  exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
