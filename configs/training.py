"""How the authors trained what they published: settings on top of ``_base_``, by patterns of recipes' names.

Every rule whose pattern fits a name counts, from the first to the last; a later one wins, key by key. A name is
TASK/HEAD_BACKBONE_SCHEDULE_DATA, or classify/MODEL_DATA. Which names there are is said by `CLASSIFIERS` and by the
table of what was published (`published`): so a new family is a few patterns here, and its rows there.

Beside the keys of a config, a rule may hold what the recipe's text says: ``note``, ``gpus`` of the published run,
``arguments`` that the command needs, ``sizes`` (how other models are trained by the same recipe) and ``source``.
Stochastic depth is that of the backbone's dense setting, and stands here where a recipe's differs.
"""

from fnmatch import fnmatchcase
from typing import Any

CLASSIFIERS = (
    "agent_cswin_base_384",
    "agent_cswin_tiny",
    "agent_deit_small",
    "agent_pvt_small",
    "agent_swin_base_384",
    "agent_swin_tiny",
    "biformer_small",
    "dat_base",
    "dat_base_384",
    "dat_pp_base_384",
    "dat_pp_tiny",
    "dat_tiny",
    "davit_tiny",
    "dinat_large_384",
    "dinat_s_tiny",
    "dinat_tiny",
    "ela_s_mobilenetv2",
    "moh_transnext_base_75",
    "moh_transnext_small_75",
    "inline_cswin_base_384",
    "inline_cswin_tiny",
    "inline_deit_tiny",
    "inline_pvt_small",
    "inline_swin_base_384",
    "inline_swin_tiny",
    "litv2_base_384",
    "litv2_small",
    "mscan_t",
    "nat_isotropic_base",
    "nat_isotropic_small",
    "nat_tiny",
    "overlock_t",
    "quadtree_b2",
    "shiftvit_light_tiny",
    "shiftvit_r2_tiny",
    "transnext_base_384",
    "transnext_tiny",
    "van_b1",
)

_LAST_RATE = "Left out: 10 epochs more at the last rate."
_THREE_TIMES = "Left out: three augmentations of each image in an epoch"
_BIASES = ("norm", "rpb")
_AGENT_BIASES = (*_BIASES, "an_bias", "na_bias", "ah_bias", "aw_bias", "ha_bias", "wa_bias")
_TRANSNEXT_BIASES = ("norm", "query_embedding", "relative_pos_bias_local", "cpb", "temperature")
# Of Mask2Former's head: what is looked up, and norms in a sequence.
_MASK2FORMER_PARTS = ("query_embed", "query_feat", "level_embed", *(f"input_proj.{i}.1" for i in range(3)))
_MMSEG_SHORTS = tuple(int(51.2 * i) for i in range(5, 21))
_OFFSETS = {"conv_offset.weight": 1e-2}  # the points of LITv2's patches move slowly
_OVERLOCK_NORMS = ("norm1", "norm2", "out_norms")
# SegNeXt decayed the norms of its stem.
_MSCAN_NORMS = ("downsample.norm", *(f"{digit}.norm" for digit in range(10)))
_BASES = "The bases of the factorisation are drawn anew in each step, as the authors' are."
_STRETCHED = dict(divisor=32)  # evaluation stretches images, a little, to multiples of 32 pixels
# What a rule holds beside the keys of a config.
TEXTS = ("note", "gpus", "arguments", "sizes", "source")


def _drop_path(rate: float) -> dict[str, Any]:
    return dict(model=dict(backbone_kwargs=dict(drop_path_rate=rate)))


RULES: tuple[tuple[str, dict[str, Any]], ...] = (
    # Classification of ImageNet-1k.
    ("classify/*_imagenet", dict(_base_=["_base_/imagenet", "_base_/schedule_300ep"])),
    (
        "classify/*_384_imagenet",
        dict(_base_=["_base_/finetune_384"], optimizer=dict(weight_decay=1e-8), arguments="model.checkpoint=FILE"),
    ),
    # NAT's settings are those of DiNAT and DiNAT_s too.
    (
        "classify/*nat_[!l]*_imagenet",
        dict(
            data=dict(augment=dict(interpolation="random")),
            optimizer=dict(clip_grad=5.0),
            note=f"{_LAST_RATE} The authors decayed tables of position bias; here they are not.",
        ),
    ),
    ("classify/nat_tiny_imagenet", dict(sizes="nat_mini, nat_small or nat_base, each with its own drop path")),
    ("classify/dinat_tiny_imagenet", dict(sizes="dinat_mini, dinat_small or dinat_base, each with its own drop path")),
    ("classify/dinat_s_tiny_imagenet", dict(sizes="dinat_s_small or dinat_s_base, each with its own drop path")),
    ("classify/nat_isotropic_small_imagenet", dict(sizes="dinat_isotropic_small or vitrpb_small")),
    (
        "classify/nat_isotropic_base_imagenet",
        dict(schedule=dict(warmup_epochs=50), ema=2e-4, sizes="dinat_isotropic_base or vitrpb_base"),
    ),
    (
        "classify/dinat_large_384_imagenet",
        dict(
            model=dict(checkpoint="dinat_large.shi_in22k"),
            loss=dict(mixup=0.0, cutmix=0.0),
            precision="float32",
            optimizer=dict(lr=5e-5, weight_decay=1e-10, clip_grad=5.0),
            schedule=dict(name="poly", power=1.0, final_factor=0.0),
            note="It starts from the weights of ImageNet-22k at 224 pixels, with a new classifier; they are fetched.",
            arguments="",
            sizes="dinat_large_384_11x11 model.checkpoint=dinat_large_384_11x11.shi_in22k, or\n"
            "    model.name=dinat_s_large_384 model.checkpoint=dinat_s_large.shi_in22k optimizer.weight_decay=1e-5",
        ),
    ),
    ("classify/agent_*", dict(data=dict(crop_mode="squash"))),
    ("classify/agent_*_tiny_imagenet", dict(schedule=dict(final_factor=1e-2))),
    ("classify/agent_*_small_imagenet", dict(schedule=dict(final_factor=1e-2))),
    (
        "classify/agent_cswin_tiny_imagenet",
        dict(
            ema=1.6e-4,
            note=f"{_LAST_RATE} The number is that of the averaged weights, as here.",
            sizes="agent_cswin_small; agent_cswin_base with batch_size=64 optimizer.lr=5e-4\n"
            "    optimizer.weight_decay=0.1 ema=8e-5",
        ),
    ),
    (
        "classify/agent_cswin_base_384_imagenet",
        dict(
            data=dict(crop_pct=0.875),
            batch_size=32,
            epochs=20,
            optimizer=dict(lr=5e-6),
            ema=2e-4,
            note=f"FILE are the weights of agent_cswin_base. {_LAST_RATE} The batch isn't stated.",
        ),
    ),
    (
        "classify/agent_deit_small_imagenet",
        dict(
            optimizer=dict(clip_grad=5.0),
            sizes="agent_deit_base; agent_deit_tiny with batch_size=512 optimizer.lr=4e-3;\n"
            "    agent_deit_small_448 with data.size=448 batch_size=64 optimizer.lr=5e-4",
        ),
    ),
    (
        "classify/agent_pvt_small_imagenet",
        dict(
            schedule=dict(warmup_epochs=5),
            note=_LAST_RATE,
            sizes="agent_pvt_tiny; agent_pvt_medium with optimizer.clip_grad=1.0; agent_pvt_large and\n"
            "    agent_pvt_medium_256 (data.size=256) with that, batch_size=64 and optimizer.lr=5e-4",
        ),
    ),
    (
        "classify/agent_swin_tiny_imagenet",
        dict(
            optimizer=dict(clip_grad=5.0),
            sizes="agent_swin_small; agent_swin_base with batch_size=64 optimizer.lr=5e-4, and so\n"
            "    agent_swin_small_288 with data.size=288 data.crop_pct=1.0",
        ),
    ),
    (
        "classify/agent_swin_base_384_imagenet",
        dict(
            batch_size=32,
            optimizer=dict(lr=1e-5, clip_grad=5.0),
            schedule=dict(warmup_epochs=5),
            note="FILE are the weights of agent_swin_base. The rate is 2e-5 for 512 images; 32 on each of 8 GPUs are "
            "256.",
        ),
    ),
    ("classify/inline_*", dict(data=dict(crop_mode="squash"))),
    *(
        (
            f"classify/inline_{host}_*[!4]_imagenet",
            dict(optimizer=dict(clip_grad=5.0), schedule=dict(final_factor=1e-2)),
        )
        for host in ("deit", "swin")
    ),
    *(
        (
            f"classify/inline_{host}_*[!4]_imagenet",
            dict(schedule=dict(warmup_factor=2e-3, final_factor=2e-2), note=_LAST_RATE),
        )
        for host in ("pvt", "cswin")
    ),
    (
        "classify/inline_deit_tiny_imagenet",
        dict(
            batch_size=512,
            optimizer=dict(lr=4e-3),
            sizes="inline_deit_small with data.size=288 batch_size=128 optimizer.lr=1e-3;\n"
            "    inline_deit_base with data.size=448 batch_size=64 optimizer.lr=5e-4",
        ),
    ),
    (
        "classify/inline_pvt_small_imagenet",
        dict(
            schedule=dict(warmup_epochs=5),
            sizes="inline_pvt_tiny; inline_pvt_medium with optimizer.clip_grad=1.0; inline_pvt_large with\n"
            "    that, batch_size=64 and optimizer.lr=5e-4",
        ),
    ),
    (
        "classify/inline_swin_tiny_imagenet",
        dict(sizes="inline_swin_small; inline_swin_base with batch_size=64 optimizer.lr=5e-4"),
    ),
    (
        "classify/inline_swin_base_384_imagenet",
        dict(
            batch_size=32,
            optimizer=dict(lr=1e-5, clip_grad=5.0),
            schedule=dict(warmup_epochs=5, final_factor=1e-2),
            note="FILE are the weights of inline_swin_base. The rate is 2e-5 for 512 images; 32 on each of 8 GPUs are "
            "256.",
            source="https://github.com/LeapLabTHU/InLine",
        ),
    ),
    (
        "classify/inline_cswin_tiny_imagenet",
        dict(
            ema=1e-4,
            note=f"{_LAST_RATE} The authors evaluate the averaged weights too, as here.",
            sizes="inline_cswin_small; inline_cswin_base with batch_size=64 optimizer.lr=5e-4\n"
            "    optimizer.weight_decay=0.1 ema=5e-5",
        ),
    ),
    (
        "classify/inline_cswin_base_384_imagenet",
        dict(
            data=dict(crop_pct=0.875),
            batch_size=32,
            epochs=20,
            optimizer=dict(lr=2.5e-6),
            ema=2.5e-5,
            note=f"FILE are the weights of inline_cswin_base. The rate is 5e-6 for 512 images. {_LAST_RATE}",
            source="https://github.com/LeapLabTHU/InLine",
        ),
    ),
    ("classify/litv2_*", dict(optimizer=dict(clip_grad=5.0, factors=_OFFSETS), schedule=dict(final_factor=1e-2))),
    (
        "classify/litv2_small_imagenet",
        dict(sizes="litv2_medium, litv2_base or a litv2_small_alpha, each with its own drop path"),
    ),
    (
        "classify/litv2_base_384_imagenet",
        dict(
            data=dict(crop_mode="squash"),
            optimizer=dict(lr=2e-5),
            schedule=dict(warmup_epochs=5),
            note="FILE are the weights of litv2_base.",
        ),
    ),
    ("classify/dat_*", dict(data=dict(crop_mode="squash"))),
    ("classify/dat_*[!4]_imagenet", dict(optimizer=dict(clip_grad=5.0), schedule=dict(final_factor=1e-2))),
    ("classify/dat_tiny_imagenet", dict(sizes="dat_small, with its own drop path")),
    (
        "classify/dat_base_imagenet",
        dict(
            optimizer=dict(lr=8e-4, clip_grad=1.0),
            schedule=dict(warmup_epochs=50),
            note="The rate is 4e-4 for 512 images.",
        ),
    ),
    (
        "classify/dat_base_384_imagenet",
        dict(
            data=dict(crop_pct=0.8767),
            optimizer=dict(lr=2e-6, clip_grad=1.0),
            note="FILE are the weights of dat_base. The rate is that of 512 images.",
        ),
    ),
    (
        "classify/dat_pp_tiny_imagenet",
        dict(sizes="dat_pp_small, or dat_pp_base with batch_size=64 on 16 GPUs, each with its own drop path"),
    ),
    (
        "classify/dat_pp_base_384_imagenet",
        dict(
            batch_size=24,
            optimizer=dict(lr=7.5e-6, clip_grad=5.0),
            note="FILE are the weights of dat_pp_base. The rate is 2e-5 for 512 images; 24 on each of 8 GPUs are 192.",
        ),
    ),
    (
        "classify/biformer_*",
        dict(
            schedule=dict(warmup_epochs=5, final_factor=1e-2),
            note=f"{_THREE_TIMES}, and 10 epochs more at the last rate.",
            sizes="biformer_tiny, biformer_base or biformer_stl, each with its own drop path",
        ),
    ),
    (
        "classify/davit_*",
        dict(
            model=dict(name="foveate_davit_tiny"),
            data=dict(crop_pct=0.9),
            optimizer=dict(clip_grad=1.0),
            schedule=dict(warmup_epochs=5, final_factor=1e-2),
            note=_LAST_RATE,
            sizes="foveate_davit_small or foveate_davit_base; their drop path isn't stated, 0.1 is ours",
        ),
    ),
    (
        "classify/quadtree_*",
        dict(
            schedule=dict(warmup_epochs=5, final_factor=1e-2),
            note=f"{_THREE_TIMES}.",
            sizes="quadtree_b0 or quadtree_b1; quadtree_b3 and quadtree_b4 with\n    optimizer.clip_grad=1.0",
        ),
    ),
    (
        "classify/shiftvit_*",
        dict(
            schedule=dict(final_factor=1e-2),
            precision="float16",
            note=f"{_THREE_TIMES}, and 10 epochs more at the last rate. The batch isn't stated.",
        ),
    ),
    ("classify/shiftvit_light_tiny_imagenet", dict(sizes="shiftvit_light_small, with its own drop path")),
    ("classify/shiftvit_r2_tiny_imagenet", dict(sizes="shiftvit_r2_small, with its own drop path")),
    (
        "classify/*transnext_*",
        dict(
            precision="float16",
            optimizer=dict(clip_grad=1.0),
            schedule=dict(warmup_epochs=5, final_factor=1e-2),
            note=f"{_THREE_TIMES}, and 10 epochs more at the last rate.",
        ),
    ),
    (
        "classify/transnext_tiny_imagenet",
        dict(
            sizes="transnext_micro, transnext_small or transnext_base, each with its own drop path;\n"
            "    transnext_micro_AAAA with data.size=256",
        ),
    ),
    (
        "classify/transnext_base_384_imagenet",
        dict(
            data=dict(crop_mode="squash"),
            loss=dict(cutmix=0.0),
            batch_size=128,
            epochs=5,
            optimizer=dict(lr=1e-5, weight_decay=0.05),
            schedule=dict(warmup_epochs=0, final_factor=1.0),
            note="FILE are the weights of transnext_base. The rate stays as it is; the batch is that of the training.",
            sizes="transnext_small_384, with its own drop path",
        ),
    ),
    ("classify/moh_transnext_small_75_imagenet", dict(sizes="moh_transnext_small_80")),
    ("classify/moh_transnext_base_75_imagenet", dict(sizes="moh_transnext_base_50")),
    (
        "classify/ela_*",
        dict(
            _base_=["_base_/folder"],
            data=dict(num_classes=1000, augment=dict(auto_augment=None, color_jitter=None, re_prob=0.0)),
            epochs=200,
            batch_size=256,
            workers=8,
            precision="bfloat16",
            optimizer=dict(name="momentum", lr=0.1, weight_decay=1e-4, no_decay=(), kwargs=dict(momentum=0.9)),
            schedule=dict(name="cosine", warmup_epochs=0, final_factor=0.0),
            source="arXiv 2403.01123",
            note="By the defaults of the authors' script, which don't state how the rate falls. Their logs end at up "
            "to 71.90 %\ntop-1, and don't say with which variant.",
            sizes="ela_l_mobilenetv2, ela_s_resnet18 or ela_s_resnet50",
        ),
    ),
    (
        "classify/overlock_*",
        dict(
            model=dict(kwargs=dict(aux_head=True)),
            data=dict(crop_pct=0.95, augment=dict(interpolation="random")),
            batch_size=256,
            optimizer=dict(lr=2e-3, clip_grad=5.0),
            schedule=dict(warmup_epochs=5, warmup_factor=5e-4),
            ema=1e-4,
            precision="float16",
            sync_batchnorm=True,
            note=f"{_LAST_RATE} Where the loss ceases to be a number, the authors go on in float32.",
            sizes="overlock_xt with data.crop_pct=0.925, overlock_s, or overlock_b with data.crop_pct=0.975",
        ),
    ),
    *(
        (
            f"classify/{name}_imagenet",
            dict(
                data=dict(crop_pct=0.9, mean=(0.5,) * 3, std=(0.5,) * 3, augment=dict(interpolation="random")),
                precision="float32",
                schedule=dict(warmup_epochs=5, final_factor=1e-3),
                note=f"{_LAST_RATE}{note}",
                sizes=sizes,
            ),
        )
        for name, note, sizes in (
            ("van_b1", "", "van_b0, van_b2 or van_b3, each with its own drop path"),
            (
                "mscan_t",
                "\nThe authors say that MSCAN was trained as VAN; they published neither code nor classifier.",
                "mscan_s, mscan_b or mscan_l, each with its own drop path",
            ),
        )
    ),
    # Detection on COCO.
    ("detect/*", dict(model=dict(pretrained=True))),
    ("detect/*_1x_coco", dict(_base_=["_base_/coco_multi_scale", "_base_/schedule_1x"])),
    ("detect/*_3x_coco", dict(_base_=["_base_/coco_multi_scale", "_base_/schedule_3x"])),
    ("detect/*_*nat_*", dict(optimizer=dict(no_decay=_BIASES), precision="float16")),
    ("detect/*_dinat*_base_*", dict(optimizer=dict(lr=7.5e-5))),
    ("detect/*_dinat_large_*", dict(optimizer=dict(lr=7.5e-5), precision="float32")),
    ("detect/*_dinat_s_large_*", dict(optimizer=dict(lr=5e-5))),
    ("detect/cascade_*_*nat_*tiny_*", _drop_path(0.3)),
    ("detect/cascade_*_nat_small_*", _drop_path(0.3)),
    ("detect/cascade_*_dinat*_small_*", _drop_path(0.5)),
    ("detect/*_agent_swin_*", dict(optimizer=dict(no_decay=_AGENT_BIASES))),
    ("detect/*_foveate_davit_*", dict(optimizer=dict(no_decay=()))),
    ("detect/*_foveate_davit_*_1x_*", _drop_path(0.1)),
    (
        "detect/*_dat_pp_*",
        dict(
            optimizer=dict(lr=4e-4, no_decay=_BIASES),
            precision="float16",
            gpus=32,
            note="The learning rate is that of 64 images a step: 2 on each of 32 GPUs.",
        ),
    ),
    ("detect/retinanet_dat_pp_*", dict(optimizer=dict(lr=2e-4))),
    ("detect/mask_rcnn_dat_pp_*", dict(model=dict(kwargs=dict(extra_convs="on_input")))),
    ("detect/*_dat_pp_tiny_1x_*", _drop_path(0.0)),
    ("detect/*_dat_pp_small_1x_*", _drop_path(0.1)),
    ("detect/retinanet_dat_pp_tiny_3x_*", _drop_path(0.2)),
    ("detect/cascade_*_dat_pp_tiny_3x_*", _drop_path(0.1)),
    ("detect/cascade_*_dat_pp_small_*", dict(precision="float32")),
    (
        "detect/cascade_*_dat_pp_base_*",
        dict(
            precision="float32",
            batch_size=1,
            gpus=64,
            note="The learning rate is that of 64 images a step: 1 on each of 64 GPUs.",
        ),
    ),
    *(
        (
            f"detect/*_{family}_*_1x_*",
            dict(
                _base_=["_base_/coco_single_scale", "_base_/schedule_1x"],
                optimizer=dict(weight_decay=1e-4, no_decay=()),
            ),
        )
        for family in ("agent_pvt", "biformer", "quadtree")
    ),
    ("detect/mask_rcnn_agent_pvt_*", dict(optimizer=dict(lr=2e-4))),
    (
        "detect/*_litv2_*_1x_coco*",
        dict(
            _base_=["_base_/coco_single_scale", "_base_/schedule_1x"],
            optimizer=dict(weight_decay=1e-4, no_decay=()),
            precision="float16",
        ),
    ),
    ("detect/mask_rcnn_litv2_*", dict(optimizer=dict(lr=2e-4, no_decay=("norm",)))),
    ("detect/mask_rcnn_quadtree_*_1x_*", dict(optimizer=dict(lr=2e-4))),
    ("detect/*_quadtree_*_3x_*", dict(optimizer=dict(no_decay=("norm",)))),
    ("detect/*_quadtree_*", dict(model=dict(norm_eval=True))),
    ("detect/*_biformer_*", dict(model=dict(norm_eval=True), precision="float16")),
    ("detect/mask_rcnn_biformer_*", dict(optimizer=dict(weight_decay=0.05, no_decay=("norm",)))),
    ("detect/*_overlock_*", dict(optimizer=dict(no_decay=_OVERLOCK_NORMS), precision="float32")),
    (
        "detect/*_overlock_*_1x_*",
        dict(_base_=["_base_/coco_single_scale", "_base_/schedule_1x"], optimizer=dict(lr=2e-4)),
    ),
    (
        "detect/mask_rcnn_transnext_*",
        dict(
            _base_=["_base_/coco_single_scale", "_base_/schedule_1x"],
            optimizer=dict(lr=1e-4, weight_decay=0.05, no_decay=_TRANSNEXT_BIASES),
            precision="float16",
        ),
    ),
    # DINO, in mmdet's settings; on our own families nobody has run it.
    (
        "detect/dino_*",
        dict(
            data=dict(keep_empty=True),
            optimizer=dict(lr=1e-4, weight_decay=1e-4, no_decay=(), factors={"backbone.": 0.1}, clip_grad=0.1),
            schedule=dict(steps=(11,), warmup_iterations=0),
            **dict(gpus=8, note=""),
        ),
    ),
    ("detect/dino_5scale_*", dict(model=dict(kwargs=dict(num_levels=5)))),
    ("detect/dino_*resnet50_*", dict(model=dict(backbone="resnet50.tv_in1k", norm_eval=True, frozen_stages=1))),
    (
        "detect/dino_improved_*",
        dict(
            model=dict(
                frozen_stages=0, kwargs=dict(temperature=1e4, offset=-0.5, denoising_queries=300, cls_weight=2.0)
            ),
            optimizer=dict(lr=2e-4, factors={"backbone.": 0.1, "sampling_offsets": 0.1}),
        ),
    ),
    (
        "detect/dino_*swin_large_*",
        dict(
            grad_checkpointing=True,
            model=dict(
                backbone="swin_large_patch4_window12_384.ms_in22k",
                backbone_kwargs=dict(drop_path_rate=0.2, dense=True, out_norms=(0, 1, 2, 3)),
            ),
        ),
    ),
    ("detect/dino_*swin_large_*_3x_*", dict(schedule=dict(steps=(27, 33)))),
    (
        "detect/dino_*transnext_*",
        dict(batch_size=1, optimizer=dict(weight_decay=0.05, no_decay=(*_TRANSNEXT_BIASES, "bias"), accumulate=2)),
    ),
    *(
        (
            f"detect/dino_{family}_*",
            dict(
                optimizer=dict(no_decay=_BIASES),
                precision="bfloat16",
                note="The settings are those of DINO on ResNet-50; the backbone's tables of positions don't decay.",
            ),
        )
        for family in ("nat", "dinat", "dat_pp")
    ),
    ("detect/dino_dat_pp_*", _drop_path(0.0)),
    # ELA's hosts, of which nothing was published: what is usual of ResNet, but for the fresh attention in every stage.
    (
        "detect/mask_rcnn_ela_*",
        dict(
            _base_=["_base_/coco_single_scale", "_base_/schedule_1x"],
            model=dict(pretrained=True, norm_eval=True),
            optimizer=dict(name="sgd", lr=0.02, weight_decay=1e-4, no_decay=()),
            note="The weights to begin with are the host's; no stage is frozen, because the attention starts fresh.",
        ),
    ),
    # Semantic segmentation of ADE20K.
    ("segment/upernet_*", dict(_base_=["_base_/ade20k", "_base_/schedule_160k"], model=dict(pretrained=True))),
    ("segment/semantic_fpn_*", dict(_base_=["_base_/ade20k", "_base_/schedule_40k"], model=dict(pretrained=True))),
    (
        "segment/*_ela_*",
        dict(
            optimizer=dict(name="sgd", lr=0.01, weight_decay=5e-4, no_decay=()),
            schedule=dict(power=0.9, warmup_iterations=0, final_factor=1e-2),
            note="The weights to begin with are the host's; the attention starts fresh.",
        ),
    ),
    ("segment/upernet_*nat_*", dict(optimizer=dict(no_decay=_BIASES), precision="float16")),
    ("segment/upernet_dinat_large_*", dict(precision="float32")),
    ("segment/upernet_agent_swin_*", dict(optimizer=dict(no_decay=_AGENT_BIASES))),
    ("segment/upernet_transnext_*", dict(optimizer=dict(no_decay=_TRANSNEXT_BIASES))),
    ("segment/semantic_fpn_agent_pvt_*", dict(optimizer=dict(no_decay=()), batch_size=2)),
    ("segment/*_foveate_davit_*", dict(optimizer=dict(no_decay=()), sync_batchnorm=False)),
    ("segment/*_dat_pp_*", dict(optimizer=dict(no_decay=_BIASES))),
    ("segment/upernet_dat_pp_[!b]*", dict(precision="float16")),
    ("segment/semantic_fpn_dat_pp_*", dict(note="40,000 steps of 32 images, which the authors call 80k.")),
    ("segment/semantic_fpn_dat_pp_[!b]*", _drop_path(0.4)),
    (
        "segment/*_quadtree_*",
        dict(
            _base_=["_base_/ade20k", "_base_/schedule_160k"],
            optimizer=dict(no_decay=("norm",), factors={"head.": 10.0, "head.neck.": 1.0}),
            data=_STRETCHED,
        ),
    ),
    (
        "segment/semantic_fpn_litv2_*",
        dict(
            optimizer=dict(lr=1e-4, no_decay=()),
            batch_size=2,
            iterations=80_000,
            schedule=dict(final_factor=1e-2),
        ),
    ),
    (
        "segment/semantic_fpn_biformer_*",
        dict(
            optimizer=dict(no_decay=()),
            data=_STRETCHED,
            iterations=80_000,
            schedule=dict(name="cosine", warmup_iterations=1000, warmup_factor=0.1, final_factor=5e-5),
            precision="float16",
        ),
    ),
    (
        "segment/upernet_biformer_*",
        dict(
            optimizer=dict(no_decay=("norm",)),
            data=_STRETCHED,
            note="The authors' own schedule file is missing; this is the usual one.",
        ),
    ),
    ("segment/upernet_biformer_small_*", _drop_path(0.3)),
    ("segment/upernet_biformer_base_*", _drop_path(0.4)),
    ("segment/upernet_overlock_*", dict(optimizer=dict(no_decay=_OVERLOCK_NORMS), data=_STRETCHED)),
    ("segment/*_van_*", dict(optimizer=dict(no_decay=("norm",)))),
    ("segment/upernet_van_b4_*", dict(batch_size=4)),
    *(
        (f"segment/upernet_{name}_22k_*", dict(model=dict(pretrained=False, backbone_checkpoint=f"{name}.mcg_in22k")))
        for name in ("van_b4", "van_b5", "van_b6")
    ),
    ("segment/semantic_fpn_van_*", dict(optimizer=dict(no_decay=()))),
    # The older heads on VAN, and SegNeXt.
    *(
        (
            f"segment/{head}_van_*",
            dict(
                _base_=["_base_/ade20k", "_base_/schedule_160k"],
                model=dict(pretrained=True, kwargs=dict(channels=512, rank=64, random_bases=True)),
                note=_BASES,
            ),
        )
        for head in ("light_ham", "ham_net")
    ),
    ("segment/light_ham_van_*", dict(data=_STRETCHED)),
    ("segment/light_ham_van_b[01]_160k_*", dict(model=dict(kwargs=dict(channels=256, rank=16)))),
    ("segment/light_ham_van_b0_512_*", dict(model=dict(kwargs=dict(ham_channels=480)))),
    ("segment/ham_net_van_*", dict(batch_size=4)),
    (
        "segment/light_ham_mscan_*",
        dict(
            _base_=["_base_/ade20k", "_base_/schedule_160k"],
            model=dict(pretrained=True, kwargs=dict(channels=256, rank=16, random_bases=True)),
            data=_STRETCHED,
            optimizer=dict(no_decay=_MSCAN_NORMS, factors={"head.": 10.0}),
            batch_size=8,
            note=_BASES,
        ),
    ),
    ("segment/light_ham_mscan_b_*", dict(model=dict(kwargs=dict(channels=512, rank=64)), batch_size=4)),
    ("segment/light_ham_mscan_l_*", dict(model=dict(kwargs=dict(channels=1024, rank=64)), batch_size=4)),
    (
        "segment/light_ham_mscan_*_cityscapes",
        dict(
            data=dict(
                name="cityscapes",
                num_classes=19,
                short=1024,
                long=2048,
                divisor=1,
                augment=dict(shorts=(1024,), long=2048, crop=1024),
            ),
            test=dict(mode="slide", crop_size=1024, stride=768),
            batch_size=4,
        ),
    ),
    ("segment/light_ham_mscan_[bl]_*_cityscapes", dict(batch_size=2)),
    (
        "segment/light_ham_mscan_*_80k_coco_stuff",
        dict(data=dict(name="coco_stuff", num_classes=171), iterations=80_000, val_interval=4),
    ),
    ("segment/light_ham_mscan_[bl]_80k_*", dict(val_interval=2)),
    # Mask2Former on DiNAT-Large, and on TransNeXt.
    *(
        (f"segment/mask2former_*_{output}", dict(model=dict(output=output)))
        for output in ("semantic", "instance", "panoptic")
    ),
    (
        "segment/mask2former_*_coco_instance",
        dict(
            _base_=["_base_/mask2former_dinat_large", "_base_/mask2former_coco"],
            data=dict(
                name="coco",
                train=dict(annotations="annotations/instances_train2017.json", images="train2017"),
                val=dict(annotations="annotations/instances_val2017.json", images="val2017"),
                num_classes=80,
            ),
        ),
    ),
    (
        "segment/mask2former_*_coco_panoptic",
        dict(
            _base_=["_base_/mask2former_dinat_large", "_base_/mask2former_coco"],
            data=dict(
                name="coco_panoptic",
                train=dict(annotations="annotations/panoptic_train2017.json", images="train2017"),
                val=dict(annotations="annotations/panoptic_val2017.json", images="val2017"),
                num_classes=133,
            ),
        ),
    ),
    (
        "segment/mask2former_*_ade20k_semantic",
        dict(_base_=["_base_/mask2former_dinat_large", "_base_/mask2former_ade20k"], data=dict(name="ade20k")),
    ),
    (
        "segment/mask2former_*_ade20k_panoptic",
        dict(
            _base_=["_base_/mask2former_dinat_large", "_base_/mask2former_ade20k"],
            data=dict(
                name="coco_panoptic",
                train=dict(
                    annotations="ade20k_panoptic_train.json", images="images/training", maps="ade20k_panoptic_train"
                ),
                val=dict(
                    annotations="ade20k_panoptic_val.json", images="images/validation", maps="ade20k_panoptic_val"
                ),
            ),
            note="The annotations are those of Mask2Former's prepare_ade20k_pan_seg.py.",
        ),
    ),
    (
        "segment/mask2former_*_ade20k_instance",
        dict(
            _base_=["_base_/mask2former_dinat_large", "_base_/mask2former_ade20k"],
            data=dict(
                name="coco",
                train=dict(annotations="ade20k_instance_train.json", images="images/training"),
                val=dict(annotations="ade20k_instance_val.json", images="images/validation"),
                num_classes=100,
            ),
            note="The annotations are those of Mask2Former's prepare_ade20k_ins_seg.py.",
        ),
    ),
    (
        "segment/mask2former_transnext_*",
        dict(
            model=dict(pretrained=True, backbone_checkpoint=None),
            data=dict(short=512, long=2048, augment=dict(shorts=_MMSEG_SHORTS, long=2048, crop=512)),
            optimizer=dict(no_decay=(*_TRANSNEXT_BIASES, *_MASK2FORMER_PARTS)),
        ),
    ),
    (
        "segment/mask2former_*_cityscapes_instance",
        dict(
            _base_=["_base_/mask2former_dinat_large", "_base_/mask2former_cityscapes"],
            data=dict(name="cityscapes_instance", num_classes=8),
        ),
    ),
    (
        "segment/mask2former_*_cityscapes_semantic",
        dict(_base_=["_base_/mask2former_dinat_large", "_base_/mask2former_cityscapes"], data=dict(name="cityscapes")),
    ),
    (
        "segment/mask2former_*_cityscapes_panoptic",
        dict(
            _base_=["_base_/mask2former_dinat_large", "_base_/mask2former_cityscapes"],
            data=dict(
                name="coco_panoptic",
                train=dict(annotations="gtFine/cityscapes_panoptic_train_trainId.json", images="leftImg8bit/train"),
                val=dict(annotations="gtFine/cityscapes_panoptic_val_trainId.json", images="leftImg8bit/val"),
            ),
            note="The annotations are those of cityscapesscripts' createPanopticImgs.py, with train ids.",
        ),
    ),
)


def settings_of(name: str) -> dict[str, Any]:
    """Return what the rules say of a recipe's name; empty if nothing."""
    settings: dict[str, Any] = {}
    for pattern, rule in RULES:
        if fnmatchcase(name, pattern):
            settings = merged(settings, rule)
    return settings


def merged(settings: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Return nested dicts with those of ``more`` on top."""
    nested = {
        key: merged(settings[key], value)
        for key, value in more.items()
        if isinstance(value, dict) and isinstance(settings.get(key), dict)
    }
    return {**settings, **more, **nested}
