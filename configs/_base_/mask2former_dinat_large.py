"""Mask2Former on DiNAT-Large: 16 images a step, 2 on each of 8 GPUs; the backbone learns ten times more slowly."""

task = "segment"
model = dict(head="mask2former", backbone="dinat_large", backbone_checkpoint="dinat_large_384_11x11.shi_in22k")
batch_size = 2
workers = 4
optimizer = dict(
    name="adamw",
    lr=1e-4,
    weight_decay=0.05,
    no_decay=(
        "norm",
        "rpb",
        "query_embed",
        "query_feat",
        "level_embed",
        "input_proj.0.1",
        "input_proj.1.1",
        "input_proj.2.1",
    ),
    factors={"backbone.": 0.1},
    clip_grad=0.01,
)
