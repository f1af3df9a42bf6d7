"""Cityscapes with mmsegmentation's default FCN: output stride 8, auxiliary head, 40k iterations, batch size 16."""

_base_ = ["../_base_/fcn_r50-d8.py", "../_base_/cityscapes_769x769.py", "../_base_/default_runtime.py"]
model = dict(
    data_preprocessor=dict(size=(769, 769)),
    decode_head=dict(num_classes=19, align_corners=True),
    auxiliary_head=dict(num_classes=19, align_corners=True),
    test_cfg=dict(mode="slide", crop_size=(769, 769), stride=(513, 513)),
)

optim_wrapper = dict(
    type="OptimWrapper", optimizer=dict(type="SGD", lr=0.01, momentum=0.9, weight_decay=0.0005), clip_grad=None
)
param_scheduler = [dict(type="PolyLR", eta_min=1e-4, power=0.9, begin=0, end=40000, by_epoch=False)]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=40000, val_interval=10000)
