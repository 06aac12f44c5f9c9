#!/usr/bin/env bats
# launch/tpu_vm.sh with a gcloud that only writes down what it is asked.
# shellcheck disable=SC2154,SC2030,SC2031 # bats sets status, output and stderr, in a subshell for each test

setup_file() { load helpers && common_setup_file; }

setup() {
  load helpers
  common_setup
}

slice_is_given() { # the usual course of things, before the container's end
  answer 'gcloud*queued-resources describe*' 1 'ERROR: (gcloud) NOT_FOUND: no such resource'
  answer 'gcloud*queued-resources describe*' 0 WAITING_FOR_RESOURCES
  answer 'gcloud*queued-resources describe*' 0 PROVISIONING
  answer 'gcloud*queued-resources describe*' 0 ACTIVE
}

workers_end_with() { # workers_end_with CODE...: of 16 workers the first ones; the others with 0
  local codes=("$@" 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0)
  local text='' i
  for i in {0..15}; do text+="w-$i ${codes[i]}\\n"; done
  answer 'gcloud*docker wait*' 0 "${text%\\n}"
}

@test "a job is checked, gets a slice, runs on all workers, and the slice is deleted" {
  slice_is_given
  workers_end_with 0
  answer 'gcloud*docker logs*' 0 'worker-0: step 1 loss 2.0'
  launch launch/tpu_vm.sh "$JOB"
  ends_with 0 'deleting biomed-1'
  [[ $output == *'worker-0: step 1 loss 2.0'* && $stderr == *'done: gs://biomed-4711-flexolmo/biomed-1'* ]]
  [[ $(called '*queued-resources create biomed-1 *') == 1 && $(called '*queued-resources delete biomed-1 *--force') == 1 ]]
  [[ $(called '*--worker=all*docker run*flexolmo train configs/7b/pair.yaml *--out gs://biomed-4711-flexolmo/biomed-1; }') == 1 ]]
  [[ $(called '*docker run* env JAX_COMPILATION_CACHE_DIR=gs://biomed-4711-flexolmo/.compiled * flexolmo train *') == 1 ]]
}

@test "the slice is what the job says" {
  slice_is_given
  workers_end_with 0
  launch launch/tpu_vm.sh "$JOB"
  create=$(grep 'queued-resources create' "$FAKE/calls")
  for flag in --project=biomed-4711 --zone=us-east5-a --accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5 --network=biomed-net \
    --service-account=flexolmo@biomed-4711.iam.gserviceaccount.com --labels=owner=biomed --spot; do
    [[ " $create " == *" $flag "* ]] || { echo "no $flag in $create" && false; }
  done
  [[ $create != *--subnetwork* ]]
}

@test "capacity and subnetwork are the job's too" {
  slice_is_given
  workers_end_with 0
  job biomed 'capacity: reserved' 'subnetwork: biomed-east'
  launch launch/tpu_vm.sh "$JOB"
  [[ $(called '*create*--subnetwork=biomed-east --reserved') == 1 && $(called '*--spot*') == 0 ]]
}

@test "a dry run calls nothing and prints what a launch calls" {
  same_as_dry_run launch/tpu_vm.sh
  answer 'gcloud*queued-resources describe*' 1 'NOT_FOUND'
  answer 'gcloud*queued-resources describe*' 0 ACTIVE
  workers_end_with 0
  launch launch/tpu_vm.sh "$JOB"
  [[ $status == 0 ]]
  # The state is asked for twice: there is none, and then it is ACTIVE.
  diff <(awk '!/^sleep/ && !seen[$0]++' "$FAKE/calls") "$FAKE/typed"
}

@test "a bucket that cannot be listed is one line, before anything is created" {
  answer 'gcloud storage ls*' 1 'ERROR: (gcloud.storage.ls) [flexolmo@x] does not have permission\nto access b.'
  launch launch/tpu_vm.sh "$JOB"
  refused 1 'cannot list gs://biomed-4711-flexolmo (flexolmo@biomed-4711.iam.gserviceaccount.com needs roles/storage.objectUser on it): '
  [[ $stderr == *'does not have permission to access b.' && $(called '*create*') == 0 && $(called '*delete*') == 0 ]]
}

@test "a bucket that cannot be written is one line, before anything is created" {
  answer 'gcloud storage cp*' 1 'ERROR: HTTPError 403'
  launch launch/tpu_vm.sh "$JOB"
  refused 1 'cannot write to gs://biomed-4711-flexolmo'
  [[ $(called '*create*') == 0 && $(called '*delete*') == 0 ]]
}

@test "a slice that gcloud refuses is one line, and nothing is deleted" {
  answer 'gcloud*describe*' 1 'NOT_FOUND'
  answer 'gcloud*queued-resources create*' 1 'ERROR: (gcloud) RESOURCE_EXHAUSTED: Quota limit TPUV5PPerProject exceeded.'
  launch launch/tpu_vm.sh "$JOB"
  ends_with 1 'cannot create the queued resource biomed-1: (gcloud) RESOURCE_EXHAUSTED: Quota limit'
  [[ $(called '*create*') == 1 && $(called '*delete*') == 0 ]]
}

@test "a state that cannot be seen is asked for again, and given up after as many restarts as the job allows" {
  job biomed 'restarts: 2'
  answer 'gcloud*describe*' 1 'ERROR: (gcloud) PERMISSION_DENIED: tpu.queuedResources.get'
  launch launch/tpu_vm.sh "$JOB"
  ends_with 75 'cannot see biomed-1: (gcloud) PERMISSION_DENIED: tpu.queuedResources.get; gave up after 2 restarts'
  [[ $(called '*describe*') == 3 && $(called '*create*') == 0 && $(called '*delete*') == 0 ]]
}

@test "an image that cannot be pulled ends the launch and deletes the slice" {
  slice_is_given
  answer 'gcloud*docker run*' 125 'docker: manifest unknown'
  launch launch/tpu_vm.sh "$JOB"
  ends_with 1 'deleting biomed-1'
  [[ $stderr == *'cannot start the container on every worker: docker: manifest unknown'* && $(called '*docker run*') == 1 ]]
}

@test "workers that cannot be reached are tried again on the same slice" {
  slice_is_given
  answer 'gcloud*docker run*' 255 'ssh: connect to host: timed out'
  answer 'gcloud*docker run*' 0
  workers_end_with 0
  launch launch/tpu_vm.sh "$JOB"
  ends_with 0 'deleting'
  [[ $(called '*docker run*') == 2 && $(called '*queued-resources create*') == 1 ]]
}

@test "a worker that does not answer at the end is asked again" {
  slice_is_given
  answer 'gcloud*docker wait*' 0 'w-0 0\nw-1 0'
  workers_end_with 0
  launch launch/tpu_vm.sh "$JOB"
  ends_with 0 'deleting'
  [[ $stderr == *'2 of 16 workers answered; restart 1 of 20'* && $(called '*docker wait*') == 2 ]]
}

@test "a log that breaks off does not end the run" {
  slice_is_given
  answer 'gcloud*docker logs*' 255 'connection reset'
  workers_end_with 0
  launch launch/tpu_vm.sh "$JOB"
  ends_with 0 'deleting'
}

for_code() { # for_code CODE: the same run starts again, in a new container on the same slice
  slice_is_given
  workers_end_with "$1" 0
  workers_end_with 0
  launch launch/tpu_vm.sh "$JOB"
  ends_with 0 'deleting'
  [[ $stderr == *"w-0 ended with $1; restart 1 of 20 in 30 s, with the same run gs://biomed-4711-flexolmo/biomed-1"* ]]
  [[ $(called '*docker rm --force biomed-1') == 1 && $(called '*docker run*') == 2 && $(called '*queued-resources create*') == 1 ]]
  [[ $(grep 'docker run' "$FAKE/calls" | sort -u | wc -l) == 1 ]]
}
@test "42, preempted and saved, starts the run again" { for_code 42; }
@test "75, a peer failed, starts the run again" { for_code 75; }
@test "134, aborted, starts the run again" { for_code 134; }
@test "137, killed, starts the run again" { for_code 137; }
@test "255, a host that went down and came back, starts the run again" { for_code 255; }

@test "a host whose accelerator is held is tried twice more and then another slice, and it is named" {
  slice_is_given
  workers_end_with 75 76 0 76
  workers_end_with 75 76
  workers_end_with 75 76
  workers_end_with 0
  answer 'gcloud*queued-resources describe*' 0 ACTIVE
  answer 'gcloud*queued-resources describe*' 0 ACTIVE
  slice_is_given
  launch launch/tpu_vm.sh "$JOB"
  ends_with 0 'deleting'
  [[ $stderr == *'the accelerator cannot be used on w-1 w-3; restart 1 of 20'*'cannot be used on w-1; restart 2'* ]]
  [[ $stderr == *'cannot be used on w-1, 3 times in a row; asking for another slice; restart 3'* ]]
  [[ $(called '*queued-resources delete*') == 2 && $(called '*queued-resources create*') == 2 && $(called '*docker run*') == 4 ]]
}

@test "hosts that stay out of reach make way for another slice, and restarts stay bounded" {
  job biomed 'restarts: 4'
  answer 'gcloud*describe*' 0 ACTIVE
  answer 'gcloud*docker run*' 255 'ssh: connect to host w-3: timed out'
  launch launch/tpu_vm.sh "$JOB"
  ends_with 75 'deleting'
  [[ $stderr == *'host w-3: timed out, 3 times in a row; asking for another slice; restart 3 of 4'* ]]
  [[ $stderr == *'gave up after 4 restarts'* && $(called '*queued-resources delete*') == 2 ]]
}

@test "1 and 2 do not start the run again, whatever the others ended with" {
  slice_is_given
  workers_end_with 75 134 1
  launch launch/tpu_vm.sh "$JOB"
  ends_with 1 'deleting'
  [[ $stderr == *'w-2 ended with 1, which starting again does not help'* && $(called '*docker run*') == 1 ]]
  forget
  slice_is_given
  workers_end_with 2
  launch launch/tpu_vm.sh "$JOB"
  ends_with 2 'deleting'
  [[ $(called '*docker run*') == 1 && $(called '*queued-resources delete*') == 1 ]]
}

@test "a slice that is taken away is deleted, and the same run goes on in a new one" {
  slice_is_given
  answer 'gcloud*docker wait*' 255 'ssh: no route to host'
  workers_end_with 0
  # After ACTIVE: the queued resource is suspended, deleted, and asked for anew.
  answer 'gcloud*queued-resources describe*' 0 SUSPENDING
  answer 'gcloud*queued-resources describe*' 0 SUSPENDED
  slice_is_given
  launch launch/tpu_vm.sh "$JOB"
  ends_with 0 'deleting'
  [[ $stderr == *'lost the workers: ssh: no route to host; restart 1'* && $stderr == *'the slice is SUSPENDED; restart 2'* ]]
  [[ $(called '*queued-resources create*') == 2 && $(called '*queued-resources delete*') == 2 && $(called '*docker run*') == 2 ]]
  [[ $(grep 'docker run' "$FAKE/calls" | sort -u | wc -l) == 1 && $(grep 'resources create' "$FAKE/calls" | sort -u | wc -l) == 1 ]]
}

@test "a slice that never comes is given up, with longer and longer waits" {
  job biomed 'restarts: 7'
  answer 'gcloud*describe*' 0 FAILED
  launch launch/tpu_vm.sh "$JOB"
  ends_with 75 'deleting'
  [[ $stderr == *'the slice is FAILED; gave up after 7 restarts; start it again, and it goes on from gs://biomed-4711-flexolmo/biomed-1'* ]]
  [[ $(grep sleep "$FAKE/calls" | tr '\n' ' ') == 'sleep 30 sleep 60 sleep 120 sleep 240 sleep 480 sleep 600 sleep 600 ' ]]
}

@test "a slice that is there already is gone on with" {
  answer 'gcloud*describe*' 0 ACTIVE
  workers_end_with 0
  launch launch/tpu_vm.sh "$JOB"
  ends_with 0 'deleting'
  [[ $(called '*create*') == 0 && $(called '*delete*') == 1 ]]
}

interrupted_by() { # interrupted_by SIGNAL STATUS
  answer 'gcloud*describe*' 0 ACTIVE
  answer 'gcloud*docker logs*' hang
  signal_during "$1" '*docker logs*' launch/tpu_vm.sh
  [[ $code == "$2" && $(tail -n 2 "$FAKE/calls") == *'docker stop'*$'\n'*'queued-resources delete'* ]]
}
@test "Ctrl-C stops the workers, which save, and deletes the slice" { interrupted_by INT 130; }
@test "SIGTERM stops the workers, which save, and deletes the slice" { interrupted_by TERM 143; }

@test "a slice that cannot be deleted is told with the command that does it" {
  answer 'gcloud*describe*' 0 ACTIVE
  workers_end_with 0
  answer 'gcloud*delete*' 1 'ERROR: (gcloud) UNAVAILABLE'
  launch launch/tpu_vm.sh "$JOB"
  ends_with 0 'it costs until it is gone: gcloud compute tpus queued-resources delete biomed-1 --project=biomed-4711'
}

@test "what tpu_vm.sh does not do is refused before anything is called" {
  job biomed 'slices: 2'
  launch launch/tpu_vm.sh "$JOB"
  refused 2 'slices is 2; expected 1 on TPU VMs; launch/gke_xpk.sh runs several'
  job biomed 'tpu: tpu7x:4x4x4'
  launch launch/tpu_vm.sh "$JOB"
  refused 2 'tpu is tpu7x:4x4x4, which is to be had through GKE only; use launch/gke_xpk.sh'
  [[ ! -s $FAKE/calls ]]
}

eight_workers_end_with() { answer 'gcloud*docker wait*' 0 "w-0 $1"'\nw-1 0\nw-2 0\nw-3 0\nw-4 0\nw-5 0\nw-6 0\nw-7 0'; }
states() { # states STATE...: in turn
  local state
  for state; do
    case $state in
      none) answer 'gcloud*describe*state.state*' 1 'ERROR: (gcloud) NOT_FOUND: no such resource' ;;
      *) answer 'gcloud*describe*state.state*' 0 "$state" ;;
    esac
  done
}

@test "a slice that is not given in time makes way for the next, with microbatches for which the batch is the same" {
  fall_back 'patience: 1'
  states none WAITING_FOR_RESOURCES none PROVISIONING PROVISIONING PROVISIONING ACTIVE
  answer 'gcloud*describe*acceleratorType*' 0 v5p-64
  eight_workers_end_with 0
  launch launch/tpu_vm.sh "$JOB"
  ends_with 0 'deleting'
  [[ $stderr == *'no v5p:4x4x4 within 1 minutes'* ]]
  [[ $(grep -o 'accelerator-type=[^ ]*' "$FAKE/calls" | tr '\n' ' ') == 'accelerator-type=v5p-128 accelerator-type=v5p-64 ' ]]
  [[ $(called '*queued-resources delete*') == 2 && $(called '*docker run*') == 1 ]]
  [[ $(called '*docker run*--set train.accumulate=8 --out gs://biomed-4711-flexolmo/biomed-1; }') == 1 ]]
}

@test "a slice that was taken away is asked for from the preferred one on, after one that failed the next" {
  fall_back
  states none ACTIVE SUSPENDED none FAILED none ACTIVE
  answer 'gcloud*describe*acceleratorType*' 0 v5p-128
  answer 'gcloud*describe*acceleratorType*' 0 v5p-64
  answer 'gcloud*docker wait*' 255 'ssh: no route to host'
  eight_workers_end_with 0
  launch launch/tpu_vm.sh "$JOB"
  ends_with 0 'deleting'
  [[ $(grep -o 'accelerator-type=[^ ]*' "$FAKE/calls" | tr '\n' ' ') == 'accelerator-type=v5p-128 accelerator-type=v5p-128 accelerator-type=v5p-64 ' ]]
  [[ $(called '*docker run*train.accumulate*') == 1 && $(called '*docker run*') == 2 ]]
}

@test "a slice that an earlier launch was given is gone on with as what it is" {
  fall_back
  states ACTIVE
  answer 'gcloud*describe*acceleratorType*' 0 v5p-64
  eight_workers_end_with 0
  launch launch/tpu_vm.sh "$JOB"
  ends_with 0 'deleting'
  [[ $(called '*create*') == 0 && $(called '*docker run*--set train.accumulate=8 *') == 1 ]]
}

@test "a dry run shows every slice that a job may get" {
  fall_back
  launch launch/tpu_vm.sh "$JOB" --dry-run
  [[ $status == 0 && ! -s $FAKE/calls ]]
  [[ $(grep -c 'accelerator-type=v5p-128 ' <<<"$output") == 1 && $(grep -c 'accelerator-type=v5p-64 ' <<<"$output") == 1 ]]
  [[ $(grep -c 'docker run' <<<"$output") == 2 && $(grep -c 'train.accumulate=8' <<<"$output") == 1 ]]
}
