#!/usr/bin/env bash
# CIFAR-10 at a scale of minutes, on two cores: pre-train, fine-tune and evaluate a small ViT with each method.
#
#   bash benchmarks/cifar10.sh FOLDER [METHOD]...     FOLDER holds train.tar and test.tar, one folder a class
#
# Methods: mae, aemim_fast, aemim, and random, which is not pre-trained. Runs and results go to runs/; started again,
# it continues. `aemim report runs/*-finetuned` puts them side by side.
set -euo pipefail
data="$1"
shift
[ $# -gt 0 ] || set -- mae aemim_fast aemim random
images=(data.source="$data/train.tar" data.test_source="$data/test.tar" data.workers=0)
size=(embed_dim=96 depth=4 num_heads=3)
mkdir -p runs
# Of each class every second one of the first 200 names, and the first 50.
tar -tf "$data/test.tar" | grep -v '/$' | sort > runs/names.txt
for pair in 1000:100:2 500:50:1; do
  IFS=: read -r count each step <<< "$pair"
  awk -F/ -v each="$each" -v step="$step" '{ n[$(NF-1)]++ } n[$(NF-1)] <= each * step && (n[$(NF-1)] - 1) % step == 0' \
    runs/names.txt > "runs/names$count.txt"
done
for method in "$@"; do
  encoder=(model.encoder="runs/$method/encoder.pt" model.name=null)
  if [ "$method" = random ]; then
    encoder=(model.encoder=random "${size[@]/#/model.options.}")
  else
    aemim pretrain "yamls/pretrain/cifar10_tiny_$method.yaml" run_name="$method" "${images[@]}" "${size[@]/#/model.}" \
      model.decoder_dim=64 model.decoder_depth=1 model.decoder_heads=2 global_batch_size=256 \
      optimizer.base_learning_rate=1.5e-3 max_duration=3ep schedule.warmup=100ba save_interval=1ep evaluate=false
  fi
  aemim finetune yamls/finetune/cifar10_tiny.yaml run_name="$method-finetuned" "${images[@]}" "${encoder[@]}" \
    max_duration=2ep schedule.warmup=100ba eval_interval=2ep save_interval=1ep augmentation.mixup=0.0 augmentation.cutmix=0.0
  aemim evaluate yamls/evaluate/cifar10.yaml classifier="runs/$method-finetuned/classifier.pt" sets.clean="$data/test.tar" \
    images=runs/names1000.txt corruptions.severities=[1,3,5] attacks.images=runs/names500.txt \
    attacks.pgd.epsilons=[0.255,0.51,1.02,2.04] workers=0 out="runs/$method-finetuned"
done
