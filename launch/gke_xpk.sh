#!/usr/bin/env bash
# One job on GKE, through XPK (1.16): a JobSet over one TPU slice or several.
#
#   launch/gke_xpk.sh launch/jobs/biomed.yaml [--dry-run]
#
# Checks the job and that the cluster is the owner's own, creates the workload, follows the logs of all its pods, and deletes it when the
# run is done, has failed, or this is interrupted. The cluster itself starts the run again where a pod ends with 42, 75, 76, 134 or 137
# or loses its node, as often as the job allows. Should this machine go down meanwhile the workload goes on, and the same command finds it
# again.
#
# Exit status: 0 done; 2 a mistake in the job, before anything was created; 1 the run failed, or a command did; 75 the cluster was out of
# reach for too long, and the workload goes on.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=steps.sh
source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"

read_job "$@"
need gcloud kubectl xpk

# ---- The commands ----

CLUSTER=("$JOB_CLUSTER" "--project=$JOB_PROJECT" "--location=$JOB_REGION")
NETWORK=(gcloud container clusters describe "${CLUSTER[@]}" "--format=value(network)")
CREDENTIALS=(gcloud container clusters get-credentials "${CLUSTER[@]}")
# XPK's pods are on the host's network, where they act as whom the node acts as, whatever their Kubernetes account stands for.
IDENTITY=(gcloud container node-pools list "--cluster=$JOB_CLUSTER" "--project=$JOB_PROJECT" "--location=$JOB_REGION"
  "--filter=config.machineType~^(ct|tpu)" "--format=value(config.serviceAccount)")
WORKLOAD=("--workload=$JOB_RUN" "--cluster=$JOB_CLUSTER" "--project=$JOB_PROJECT" "--zone=$JOB_ZONE")
# exec: XPK runs the command in a subshell and sends SIGTERM to that, which has to be flexolmo itself for the run to be saved. By itself
# XPK would restart nothing, and give a pod 30 seconds to save.
CREATE=(xpk workload create "${WORKLOAD[@]}" "--tpu-type=$JOB_CHIP-$JOB_TORUS" "--num-slices=$JOB_SLICES" "--docker-image=$JOB_IMAGE"
  "--command=exec $JOB_COMMAND" "--restart-on-exit-codes=42,75,76,134,137" "--max-restarts=$JOB_RESTARTS"
  --termination-grace-period-seconds=300)
case $JOB_CAPACITY in
  reserved) CREATE+=("--reservation=$JOB_RESERVATION") ;;
  *) CREATE+=("--$JOB_CAPACITY") ;;
esac
STATE=(kubectl get jobset "$JOB_RUN" "--output=jsonpath={.status.terminalState}")
PODS="--selector=xpk.google.com/workload=$JOB_RUN"
FOLLOW=(kubectl logs --follow --prefix --tail=1000 --container=jax-tpu "--max-log-requests=$((JOB_HOSTS * JOB_SLICES * 2))" "$PODS")
CODES=(kubectl get pods "$PODS" "--output=jsonpath={.items[*].status.containerStatuses[*].state.terminated.exitCode}")
DELETE=(xpk workload delete "${WORKLOAD[@]}" --force)

# ---- The steps ----

CREATED=''
KUBECONFIG=$(mktemp) # of this launch alone: beside it another owner's may run, on another cluster
export KUBECONFIG

clean_up() { # clean_up STATUS
  # 75: the cluster is out of reach. The run needs no launcher, and the same command finds it again.
  if [[ -n $CREATED ]] && (($1 != 75)); then
    say "deleting $JOB_RUN; pods that run save first"
    try "${DELETE[@]}" || say "could not delete it, and it costs until it is gone: $(show "${DELETE[@]}") ($complaint)"
  fi
  rm -f "$KUBECONFIG"
}

check_bucket
call "cannot see cluster $JOB_CLUSTER" "${NETWORK[@]}"
[[ -n $DRY_RUN || $answer == "$JOB_NETWORK" ]] || die 2 "cluster $JOB_CLUSTER is in network '$answer'; expected the job's, $JOB_NETWORK"
call "cannot see whom the TPU nodes of $JOB_CLUSTER act as" "${IDENTITY[@]}"
[[ -n $DRY_RUN || $(sort -u <<<"$answer") == "$JOB_SERVICE_ACCOUNT" ]] ||
  die 2 "TPU nodes of $JOB_CLUSTER act as '${answer//$'\n'/, }'; expected the job's service account, $JOB_SERVICE_ACCOUNT, on all of them"
call "cannot get credentials for cluster $JOB_CLUSTER" "${CREDENTIALS[@]}"

if [[ -n $DRY_RUN ]]; then
  show "${STATE[@]}"
  show "${CREATE[@]}"
  show "${FOLLOW[@]}"
  show "${CODES[@]}"
  show "${DELETE[@]}"
  exit
fi

if try "${STATE[@]}"; then
  say "$JOB_RUN is there already; going on with it"
elif [[ $complaint != *NotFound* ]]; then
  die 1 "cannot see workload $JOB_RUN: $complaint"
else
  CREATED=yes # even if this is interrupted before XPK answers
  try "${CREATE[@]}" || { CREATED='' && die 1 "cannot create workload $JOB_RUN: $complaint"; }
fi
CREATED=yes
while :; do
  if ! try "${STATE[@]}"; then
    again "cannot see workload $JOB_RUN: $complaint" # this launcher's trouble: the workload goes on
    continue
  fi
  case $answer in
    Completed) break ;;
    Failed)
      try "${CODES[@]}" || true
      die 1 "the run failed; its pods ended with ${answer:-no exit code}; the last lines are above"
      ;;
  esac
  patiently "${FOLLOW[@]}" || true # ends when the pods do, and fails while there are none; the state says which
  patiently sleep "$POLL"
done
say "done: $JOB_OUT"
