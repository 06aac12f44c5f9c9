#!/usr/bin/env bats
# launch/skypilot.sh with a sky and a gcloud that only write down what they are asked.
# shellcheck disable=SC2154,SC2030,SC2031 # bats sets status, output and stderr, in a subshell for each test

setup_file() { load helpers && common_setup_file; }

setup() {
  load helpers
  common_setup
}

@test "a job is checked and launched with what is the owner's" {
  answer 'gcloud config get project' 0 biomed-4711
  answer 'sky jobs launch*' 0 'step 1 loss 2.0'
  launch launch/skypilot.sh "$JOB"
  ends_with 0 'done: gs://biomed-4711-flexolmo/biomed-1'
  sky=$(grep sky "$FAKE/calls")
  for flag in --name=biomed-1 --infra=gcp/us-east5/us-east5-a --gpus=tpu-v5p-128:1 --config=gcp.vpc_name=biomed-net --use-spot \
    --image-id=docker:us-east5-docker.pkg.dev/biomed-4711/flexolmo/flexolmo:0.1.0; do
    [[ " $sky " == *" $flag "* ]] || { echo "no $flag in $sky" && false; }
  done
  [[ $output == *'step 1 loss 2.0'* && $sky == *'--env=COMMAND=env JAX_COMPILATION_CACHE_DIR=gs://biomed-4711-flexolmo/.compiled '*' flexolmo train configs/7b/pair.yaml '* ]]
}

@test "a dry run calls nothing and prints what a launch calls" {
  same_as_dry_run launch/skypilot.sh
  answer 'gcloud config get project' 0 biomed-4711
  launch launch/skypilot.sh "$JOB"
  [[ $status == 0 ]]
  diff "$FAKE/calls" "$FAKE/typed"
}

@test "whose account the workers are is said, as it is not the job's" {
  local words='the workers act as skypilot-v1@biomed-4711.iam.gserviceaccount.com, which SkyPilot makes, and not as the job'
  launch launch/skypilot.sh "$JOB" --dry-run
  ends_with 0 "$words"
  [[ $stderr == *'it needs roles/storage.objectUser on gs://biomed-4711-flexolmo, which is not checked' ]]
  answer 'gcloud config get project' 0 biomed-4711
  launch launch/skypilot.sh "$JOB"
  [[ $stderr == *"$words"* ]]
}

@test "another project than gcloud's is refused before anything is launched" {
  answer 'gcloud config get project' 0 code-2718
  launch launch/skypilot.sh "$JOB"
  refused 2 "gcloud's project is 'code-2718'; expected gcloud config set project biomed-4711"
  [[ $(called 'sky*') == 0 ]]
}

@test "a failure of each command is one line" {
  answer 'gcloud config get project' 0 biomed-4711
  answer 'gcloud storage ls*' 1 'ERROR: 403'
  launch launch/skypilot.sh "$JOB"
  refused 1 'cannot list gs://biomed-4711-flexolmo'
  : >"$FAKE/answers"
  answer 'gcloud config get project' 1 'ERROR: no configuration'
  launch launch/skypilot.sh "$JOB"
  refused 1 "cannot see gcloud's project: no configuration"
  [[ $(called 'sky*') == 0 ]]
  : >"$FAKE/answers"
  answer 'gcloud config get project' 0 biomed-4711
  answer 'sky jobs launch*' 100
  launch launch/skypilot.sh "$JOB"
  ends_with 1 'the job failed, or could not be launched'
  [[ $(called 'sky jobs cancel*') == 0 ]]
}

@test "SkyPilot starts the run again a few times, and without a bound only where it was preempted and saved" {
  grep -qx '    max_restarts_on_errors: 5' launch/skypilot.yaml
  grep -qx '    recover_on_exit_codes: \[42\]' launch/skypilot.yaml
  for task in launch/skypilot.yaml launch/ray/skypilot.yaml; do [[ $(grep -c max_restarts_on_errors "$task") == 1 ]]; done
}

@test "SIGTERM cancels the job" {
  answer 'gcloud config get project' 0 biomed-4711
  answer 'sky jobs launch*' hang
  signal_during TERM 'sky jobs launch*' launch/skypilot.sh
  [[ $code == 143 && $(tail -n 1 "$FAKE/calls") == 'sky jobs cancel --yes --name=biomed-1' ]]
}

@test "what SkyPilot cannot do is refused before anything is called" {
  job biomed 'capacity: reserved'
  launch launch/skypilot.sh "$JOB"
  refused 2 'capacity is reserved; expected spot or on-demand'
  job biomed 'tpu: v5e:16x16'
  launch launch/skypilot.sh "$JOB"
  refused 2 'tpu is v5e:16x16; expected v5p or v6e'
  job biomed 'slices: 2'
  launch launch/skypilot.sh "$JOB"
  refused 2 'slices is 2; expected 1 with SkyPilot; launch/gke_xpk.sh runs several'
  [[ ! -s $FAKE/calls ]]
}

@test "fallbacks are refused before anything is called" {
  job biomed 'fallbacks: [v5p:2x4x4]'
  launch launch/skypilot.sh "$JOB"
  refused 2 'fallbacks has 1; expected none with SkyPilot; launch/tpu_vm.sh takes them'
  [[ ! -s $FAKE/calls ]]
}
