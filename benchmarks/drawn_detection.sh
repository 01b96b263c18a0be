#!/usr/bin/env bash
# What a pre-trained encoder is worth to a detector, at a scale of minutes, on two cores: Mask R-CNN on a frozen and on a
# trained encoder, pre-trained and random, of which the last table has the average precision side by side.
#
#   bash benchmarks/drawn_detection.sh [RUN]     RUN is a pre-training with the ViT of yamls/quickstart.yaml, by default
#                                                runs/quickstart, which `make quickstart` leaves
#
# Objects are drawn on photographs (tests/drawn_coco.py). Runs and results go to runs/; started again, it continues.
set -euo pipefail
run="${1:-runs/quickstart}"
set=runs/drawn
for part in train:240 test:60; do
  IFS=: read -r name images <<< "$part"
  python tests/drawn_coco.py "$set" "$name" "$images"
  aemim data coco "$set/annotations/instances_$name.json" "$set/$name" "$set/shards-$name"
done
random=(model.encoder=random model.name=mae_vit_tiny_patch4)
for size in image_size=24 embed_dim=96 depth=4 num_heads=3; do random+=("model.options.$size"); done
for encoder in random pretrained; do
  start=(model.encoder="$run/encoder.pt")
  [ "$encoder" = pretrained ] || start=("${random[@]}")
  for frozen in true false; do
    name=drawn-$encoder; [ "$frozen" = false ] || name=$name-frozen
    aemim detect yamls/detect/tiny.yaml run_name="$name" "${start[@]}" model.freeze_encoder="$frozen" \
      data.source="$set/shards-train" data.test_source="$set/shards-test"
  done
done
aemim report runs/drawn-{random,pretrained}{-frozen,} --out runs/drawn-report
sed -n "/^## Scores/,/^The paper's rows/p" runs/drawn-report/report.md
