"""Cityscapes with MoCo's FCN: 90k iterations, batch size 16, learning rate 0.01, divided by 10 after 70% and 90%."""

_base_ = ["../_base_/fcn_d6_r50-d16.py", "../_base_/cityscapes.py"]
model = dict(
    data_preprocessor=dict(size=(769, 769)),
    decode_head=dict(num_classes=19),
    test_cfg=dict(mode="slide", crop_size=(769, 769), stride=(513, 513)),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=(2049, 1025), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(769, 769)),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(2049, 1025), keep_ratio=True),
    dict(type="LoadAnnotations"),  # after Resize, so that the metrics are computed at the labels' original size
    dict(type="PackSegInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(
    type="OptimWrapper", optimizer=dict(type="SGD", lr=0.01, momentum=0.9, weight_decay=0.0001), clip_grad=None
)
param_scheduler = [dict(type="MultiStepLR", milestones=[63000, 81000], gamma=0.1, by_epoch=False)]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=90000, val_interval=15000)
