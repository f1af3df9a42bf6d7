"""Cityscapes with MoCo's FCN: 90k iterations, batch size 16, learning rate 0.01, divided by 10 after 70% and 90%."""

_base_ = ["../_base_/fcn_d6_r50-d16.py", "../_base_/cityscapes_769x769.py", "../_base_/default_runtime.py"]
model = dict(
    data_preprocessor=dict(size=(769, 769)),
    decode_head=dict(num_classes=19),
    test_cfg=dict(mode="slide", crop_size=(769, 769), stride=(513, 513)),
)

optim_wrapper = dict(
    type="OptimWrapper", optimizer=dict(type="SGD", lr=0.01, momentum=0.9, weight_decay=0.0001), clip_grad=None
)
param_scheduler = [dict(type="MultiStepLR", milestones=[63000, 81000], gamma=0.1, by_epoch=False)]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=90000, val_interval=15000)
