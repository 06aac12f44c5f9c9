#!/usr/bin/env bats
# launch/slurm.sbatch with an srun and a scontrol that only write down what they are asked.
# shellcheck disable=SC2154,SC2030,SC2031 # bats sets status, output and stderr, in a subshell for each test

setup() {
  load helpers
  common_setup
  export SLURM_JOB_ID=7 SLURM_NTASKS=16
  unset SLURM_RESTART_COUNT JAX_COMPILATION_CACHE_DIR
  mkdir "$FAKE/runs"
  RUN=(launch/slurm.sbatch configs/7b/pair.yaml "$FAKE/runs/biomed" --set 'pair.owner=Biomed Institute' --set train.accumulate=8)
}

@test "every process is started by srun, in the same run" {
  launch "${RUN[@]}"
  [[ $status == 0 && $(<"$FAKE/calls") == "srun --export=ALL --ntasks=16 env JAX_COMPILATION_CACHE_DIR=$FAKE/runs/.compiled "* ]]
  [[ $(called '* flexolmo train configs/7b/pair.yaml --set pair.owner=Biomed Institute*') == 1 ]]
  [[ $(called "* --out $FAKE/runs/biomed") == 1 ]]
}

@test "a container is run where one is named" {
  CONTAINER=registry/flexolmo:1 launch "${RUN[@]}"
  [[ $(called "srun * --container-image=registry/flexolmo:1 --container-mounts=$PWD:$PWD --container-workdir=$PWD env * flexolmo train*") == 1 ]]
}

@test "42, 75, 76, 134 and 137 requeue the job" {
  for code in 42 75 76 134 137; do
    forget
    answer 'srun*' "$code"
    launch "${RUN[@]}"
    ends_with 0 "a process ended with $code; restart 1, with the same run $FAKE/runs/biomed"
    [[ $(tail -n 1 "$FAKE/calls") == 'scontrol requeue 7' ]]
  done
}

@test "nodes whose GPUs could not be used are named, and the job is requeued without them and those before" {
  answer 'srun*' 76 'step 1\nflexolmo: host gpu-7.cluster cannot be used: device or resource busy\nflexolmo: host gpu-12 cannot be used: x'
  answer 'scontrol --oneliner show job 7' 0 'JobId=7 ReqNodeList=(null) ExcNodeList=gpu-[1-2] MinCPUsNode=1'
  launch "${RUN[@]}"
  ends_with 0 'a process ended with 76; restart 1 without gpu-[1-2],gpu-12,gpu-7, with the same run'
  [[ $stderr == *'flexolmo: host gpu-7.cluster cannot be used'* ]]
  [[ $(tail -n 2 "$FAKE/calls") == 'scontrol requeue 7'$'\n''scontrol update JobId=7 ExcNodeList=gpu-[1-2],gpu-12,gpu-7' ]]
}

@test "a node that cannot be excluded is told, and the job is requeued all the same" {
  answer 'srun*' 76 'flexolmo: host gpu-7 cannot be used: busy'
  answer 'scontrol --oneliner show job 7' 0 'JobId=7 ExcNodeList=(null)'
  answer 'scontrol update*' 1 'Access denied'
  launch "${RUN[@]}"
  ends_with 0 'could not exclude gpu-7'
  [[ $(called 'scontrol requeue 7') == 1 ]]
}

@test "what a run prints and what it complains of stay apart" {
  answer 'srun*' 0 'the result'
  launch "${RUN[@]}"
  [[ $status == 0 && $output == 'the result' && -z $stderr ]]
}

@test "1 and 2 end it" {
  for code in 1 2; do
    forget
    answer 'srun*' "$code"
    launch "${RUN[@]}"
    [[ $status == "$code" && $(called 'scontrol*') == 0 ]]
  done
}

@test "restarts are bounded, and a requeue that fails ends it with the run's own code" {
  answer 'srun*' 75
  SLURM_RESTART_COUNT=3 MAX_RESTARTS=3 launch "${RUN[@]}"
  [[ $status == 75 && $(called 'scontrol*') == 0 ]]
  answer 'scontrol*' 1 'Requested operation is disabled'
  launch "${RUN[@]}"
  [[ $status == 75 && $(called 'scontrol*') == 1 ]]
}

@test "compiled programs are kept beside the run, in a folder of the user alone, or where JAX is told" {
  launch "${RUN[@]}"
  [[ $(stat -c %a "$FAKE/runs/.compiled") == 700 ]]
  forget
  JAX_COMPILATION_CACHE_DIR=$FAKE/mine launch "${RUN[@]}"
  [[ $(called "srun * env JAX_COMPILATION_CACHE_DIR=$FAKE/mine *") == 1 && $(stat -c %a "$FAKE/mine") == 700 ]]
  forget
  RUN[2]=gs://biomed/runs/1
  launch "${RUN[@]}"
  [[ $status == 0 && $(called "srun * env JAX_COMPILATION_CACHE_DIR=gs://biomed/runs/.compiled *") == 1 && ! -e gs: ]]
}

@test "a folder of compiled programs that is another user's is refused before srun" {
  if [[ -O / ]]; then
    mkdir "$FAKE/runs/.compiled"
    chown nobody "$FAKE/runs/.compiled"
  else
    ln -s / "$FAKE/runs/.compiled"
  fi
  launch "${RUN[@]}"
  refused 2 "$FAKE/runs/.compiled is another user's; expected a folder of one's own: set JAX_COMPILATION_CACHE_DIR"
  [[ ! -s $FAKE/calls ]]
}

@test "a dry run calls nothing and prints what a job calls" {
  launch launch/slurm.sbatch --dry-run "${RUN[@]:1}"
  [[ $status == 0 && ! -s $FAKE/calls ]]
  bash <<<"$output"
  mv "$FAKE/calls" "$FAKE/typed"
  answer 'srun*' 42
  launch "${RUN[@]}"
  diff "$FAKE/calls" "$FAKE/typed"
}

@test "a batch that does not divide, a missing argument and a missing environment are one line each, before srun" {
  SLURM_NTASKS=48 launch "${RUN[@]}"
  refused 2 'a microbatch of 128 records (data.batch_size 1024 / train.accumulate 8) does not divide over the 48 devices'
  launch launch/slurm.sbatch configs/7b/pair.yaml
  refused 2 'got configs/7b/pair.yaml; expected [--dry-run] CONFIG OUT'
  launch launch/slurm.sbatch configs/7b/pair.yaml gs://bucket/
  refused 2 'got the bucket gs://bucket/; expected a folder in it, such as gs://bucket/run'
  unset SLURM_NTASKS
  launch "${RUN[@]}"
  refused 2 'SLURM_NTASKS is not set; expected sbatch to start this; for a dry run, set it to the number of GPUs'
  [[ ! -s $FAKE/calls ]]
}
