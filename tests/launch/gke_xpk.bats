#!/usr/bin/env bats
# launch/gke_xpk.sh with an xpk, a kubectl and a gcloud that only write down what they are asked.
# shellcheck disable=SC2154,SC2030,SC2031 # bats sets status, output and stderr, in a subshell for each test

setup_file() { load helpers && common_setup_file; }

setup() {
  load helpers
  common_setup
}

cluster_is_the_owners() {
  answer 'gcloud container clusters describe*' 0 biomed-net
  answer 'gcloud container node-pools list*' 0 'flexolmo@biomed-4711.iam.gserviceaccount.com\nflexolmo@biomed-4711.iam.gserviceaccount.com'
}

run_ends_with() { # run_ends_with STATE: after two looks at which it is still running
  answer 'kubectl get jobset*' 1 'Error from server (NotFound): jobsets.jobset.x-k8s.io "biomed-1" not found'
  answer 'kubectl get jobset*' 0
  answer 'kubectl get jobset*' 0
  answer 'kubectl get jobset*' 0 "$1"
}

@test "a job is checked, created, followed to its end and deleted" {
  cluster_is_the_owners
  run_ends_with Completed
  answer 'kubectl logs*' 0 '[pod/biomed-1-slice-job-0-0] step 1 loss 2.0'
  launch launch/gke_xpk.sh "$JOB"
  ends_with 0 'deleting biomed-1'
  [[ $output == *'step 1 loss 2.0'* && $stderr == *'done: gs://biomed-4711-flexolmo/biomed-1'* && $(called 'kubectl logs --follow*') == 2 ]]
  [[ $(called 'xpk workload create*') == 1 && $(called 'xpk workload delete --workload=biomed-1 *--force') == 1 ]]
}

@test "the workload restarts on the codes that starting again helps, with time to save, as often as the job allows" {
  cluster_is_the_owners
  run_ends_with Completed
  job biomed 'restarts: 7'
  launch launch/gke_xpk.sh "$JOB"
  create=$(grep 'xpk workload create' "$FAKE/calls")
  for flag in --restart-on-exit-codes=42,75,76,134,137 --max-restarts=7 --termination-grace-period-seconds=300 --tpu-type=v5p-4x4x4 --spot \
    --num-slices=1 --cluster=biomed-gke --project=biomed-4711 --zone=us-east5-a; do
    [[ " $create " == *" $flag "* ]] || { echo "no $flag in $create" && false; }
  done
  [[ $create == *'--command=exec env JAX_COMPILATION_CACHE_DIR=gs://biomed-4711-flexolmo/.compiled '*' flexolmo train configs/7b/pair.yaml '* ]]
  [[ $create == *'--out gs://biomed-4711-flexolmo/biomed-1 '* ]]
}

@test "several slices and a reservation are the job's" {
  cluster_is_the_owners
  run_ends_with Completed
  job biomed 'slices: 2' 'capacity: reserved' 'reservation: june'
  set_also mesh.data=2
  plan_too
  launch launch/gke_xpk.sh "$JOB"
  ends_with 0 'deleting'
  [[ $(called 'xpk workload create*--num-slices=2*--reservation=june') == 1 && $(called '*--spot*') == 0 ]]
}

@test "a dry run calls nothing and prints what a launch calls" {
  same_as_dry_run launch/gke_xpk.sh
  cluster_is_the_owners
  run_ends_with Completed
  launch launch/gke_xpk.sh "$JOB"
  [[ $status == 0 ]]
  # Only a run that failed is asked for its exit codes.
  diff <(awk '!/^sleep/ && !seen[$0]++' "$FAKE/calls") <(grep -v 'get pods' "$FAKE/typed")
}

@test "a failure of each command before the workload is there is one line, and nothing is created" {
  local command message
  while IFS='|' read -r command message; do
    forget
    answer "$command" 1 'ERROR: it said no'
    cluster_is_the_owners
    launch launch/gke_xpk.sh "$JOB"
    refused 1 "$message"
    [[ $stderr == *'it said no' && $(called 'xpk*') == 0 ]]
  done <<'EOF'
gcloud storage ls*|cannot list gs://biomed-4711-flexolmo
gcloud storage cp*|cannot write to gs://biomed-4711-flexolmo
gcloud container clusters describe*|cannot see cluster biomed-gke
gcloud container clusters get-credentials*|cannot get credentials for cluster biomed-gke
gcloud container node-pools list*|cannot see whom the TPU nodes of biomed-gke act as
kubectl get jobset*|cannot see workload biomed-1
EOF
}

@test "another owner's cluster is refused by its network" {
  answer 'gcloud container clusters describe*' 0 code-net
  launch launch/gke_xpk.sh "$JOB"
  refused 2 "cluster biomed-gke is in network 'code-net'; expected the job's, biomed-net"
  [[ $(called 'xpk*') == 0 ]]
}

@test "nodes that act as somebody else, even one of them, and a cluster without TPUs are refused" {
  local accounts
  for accounts in default 'flexolmo@biomed-4711.iam.gserviceaccount.com\ndefault' ''; do
    forget
    answer 'gcloud container clusters describe*' 0 biomed-net
    answer 'gcloud container node-pools list*' 0 "$accounts"
    launch launch/gke_xpk.sh "$JOB"
    refused 2 "TPU nodes of biomed-gke act as '${accounts/\\n/, }'; expected the job's service account, flexolmo@biomed-4711.iam.gser"
    [[ $(called 'xpk*') == 0 ]]
  done
}

@test "a workload that XPK refuses is one line, and nothing is deleted" {
  cluster_is_the_owners
  answer 'kubectl get jobset*' 1 NotFound
  answer 'xpk workload create*' 1 'usage: xpk\\n  of many lines\\nxpk workload create: error: argument --tpu-type: invalid choice'
  launch launch/gke_xpk.sh "$JOB"
  refused 1 'cannot create workload biomed-1: argument --tpu-type: invalid choice'
  [[ $(called 'xpk workload delete*') == 0 ]]
}

@test "a run that failed is told with its pods' exit codes, and deleted" {
  cluster_is_the_owners
  run_ends_with Failed
  answer 'kubectl get pods*' 0 '2 134 134'
  launch launch/gke_xpk.sh "$JOB"
  ends_with 1 'deleting'
  [[ $stderr == *'the run failed; its pods ended with 2 134 134'* && $(called 'xpk workload delete*') == 1 ]]
}

@test "pods that are preempted and restarted by the cluster are followed on" {
  cluster_is_the_owners
  run_ends_with Completed
  answer 'kubectl logs*' 1 'error: pods are gone'
  answer 'kubectl logs*' 0 'step 2'
  launch launch/gke_xpk.sh "$JOB"
  ends_with 0 'deleting'
  [[ $output == *'step 2'* && $(called 'xpk workload create*') == 1 ]]
}

@test "a cluster that cannot be reached for a while does not end the launch" {
  cluster_is_the_owners
  answer 'kubectl get jobset*' 0
  answer 'kubectl get jobset*' 1 'Unable to connect to the server'
  answer 'kubectl get jobset*' 0 Completed
  launch launch/gke_xpk.sh "$JOB"
  ends_with 0 'deleting'
  [[ $stderr == *'biomed-1 is there already'*'Unable to connect to the server; restart 1 of 20'* && $(called 'xpk workload create*') == 0 ]]
}

@test "a cluster that is out of reach for too long ends the launch and not the run" {
  job biomed 'restarts: 2'
  cluster_is_the_owners
  answer 'kubectl get jobset*' 0
  answer 'kubectl get jobset*' 1 'Unable to connect to the server'
  launch launch/gke_xpk.sh "$JOB"
  ends_with 75 'cannot see workload biomed-1: Unable to connect to the server; gave up after 2 restarts; start it again'
  [[ $(called 'xpk workload delete*') == 0 ]]
}

@test "SIGTERM deletes the workload" {
  cluster_is_the_owners
  answer 'kubectl get jobset*' 0
  answer 'kubectl logs*' hang
  signal_during TERM 'kubectl logs*' launch/gke_xpk.sh
  [[ $code == 143 && $(tail -n 1 "$FAKE/calls") == 'xpk workload delete'* ]]
}

@test "a job without a cluster or a reservation's name is refused before anything is called" {
  job biomed 'cluster: ""'
  launch launch/gke_xpk.sh "$JOB"
  refused 2 "cluster is ''; expected the name of the owner's GKE cluster in us-east5"
  job biomed 'capacity: reserved'
  launch launch/gke_xpk.sh "$JOB"
  refused 2 "reservation is ''; expected its name"
  [[ ! -s $FAKE/calls ]]
}

@test "fallbacks are refused before anything is called" {
  job biomed 'fallbacks: [v5p:2x4x4]'
  launch launch/gke_xpk.sh "$JOB"
  refused 2 'fallbacks has 1; expected none on GKE; launch/tpu_vm.sh takes them'
  [[ ! -s $FAKE/calls ]]
}
