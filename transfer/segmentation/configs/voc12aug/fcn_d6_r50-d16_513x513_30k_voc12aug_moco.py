"""PASCAL VOC with MoCo's FCN: 30k iterations, batch size 16, learning rate 0.003, divided by 10 after 70% and 90%."""
# mypy: disable-error-code="attr-defined"

_base_ = ["../_base_/fcn_d6_r50-d16.py", "../_base_/voc12aug.py"]
model = dict(decode_head=dict(num_classes=21))

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=(2049, 513), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(513, 513)),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(2049, 513), keep_ratio=True),
    dict(type="LoadAnnotations"),  # after Resize, so that the metrics are computed at the labels' original size
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    dataset=dict(datasets=[dict(part, pipeline=train_pipeline) for part in _base_.train_dataloader.dataset.datasets])
)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(
    type="OptimWrapper", optimizer=dict(type="SGD", lr=0.003, momentum=0.9, weight_decay=0.0001), clip_grad=None
)
param_scheduler = [dict(type="MultiStepLR", milestones=[21000, 27000], gamma=0.1, by_epoch=False)]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=30000, val_interval=5000)
