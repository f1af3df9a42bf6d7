"""ADE20K with mmsegmentation's default FCN: output stride 8, auxiliary head, 80k iterations, batch size 16."""
# mypy: disable-error-code="attr-defined"

_base_ = [  # mmengine replaces the list by the merged content of the files
    "../_base_/fcn_r50-d8.py",
    "../_base_/ade20k.py",
    "../_base_/pipelines_512x512.py",
]
model = dict(decode_head=dict(num_classes=150), auxiliary_head=dict(num_classes=150))

train_dataloader = dict(dataset=dict(pipeline=_base_.train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=_base_.test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(
    type="OptimWrapper", optimizer=dict(type="SGD", lr=0.01, momentum=0.9, weight_decay=0.0005), clip_grad=None
)
param_scheduler = [dict(type="PolyLR", eta_min=1e-4, power=0.9, begin=0, end=80000, by_epoch=False)]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=80000, val_interval=10000)
