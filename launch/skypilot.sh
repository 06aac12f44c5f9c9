#!/usr/bin/env bash
# One job on a TPU slice, through SkyPilot's managed jobs; launch/skypilot.yaml is the task.
#
#   launch/skypilot.sh launch/jobs/biomed.yaml [--dry-run]
#
# Checks the job, launches it and follows its log. SkyPilot restarts the run, and deletes the slice when it is over; interrupting this
# cancels the job.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=steps.sh
source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"

read_job "$@"
need gcloud sky

PROJECT=(gcloud config get project)
LAUNCH=(sky jobs launch "$HERE/skypilot.yaml" --yes "--name=$JOB_RUN" "--infra=gcp/$JOB_REGION/$JOB_ZONE" "--gpus=tpu-$JOB_ACCELERATOR:1"
  "--image-id=docker:$JOB_IMAGE" "--config=gcp.vpc_name=$JOB_NETWORK" "--env=COMMAND=$JOB_COMMAND")
if [[ $JOB_CAPACITY == spot ]]; then LAUNCH+=(--use-spot); else LAUNCH+=(--no-use-spot); fi
CANCEL=(sky jobs cancel --yes "--name=$JOB_RUN")

LAUNCHED=''
clean_up() { # clean_up STATUS
  if [[ -n $LAUNCHED ]] && (($1 > 128)); then # otherwise it is over, or never began
    try "${CANCEL[@]}" || say "could not cancel $JOB_RUN, and it costs until it is: $(show "${CANCEL[@]}") ($complaint)"
  fi
}

# It launches in gcloud's project, whatever the job says.
call "cannot see gcloud's project" "${PROJECT[@]}"
[[ -n $DRY_RUN || $answer == "$JOB_PROJECT" ]] || die 2 "gcloud's project is '$answer'; expected gcloud config set project $JOB_PROJECT"
check_bucket
# What check_bucket has shown is of another account.
say "the workers act as skypilot-v1@$JOB_PROJECT.iam.gserviceaccount.com, which SkyPilot makes, and not as the job's" \
  "service_account; it needs roles/storage.objectUser on gs://$JOB_BUCKET, which is not checked"
if [[ -n $DRY_RUN ]]; then
  show "${LAUNCH[@]}"
  exit
fi
LAUNCHED=yes
patiently "${LAUNCH[@]}" || die 1 "the job failed, or could not be launched; SkyPilot's last lines are above"
say "done: $JOB_OUT"
