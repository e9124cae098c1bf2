"""The configuration keys of Mask2Former on top of Detectron2's.

The names and defaults in the first part are those of the published model, so that published
recipes load unchanged. One of them is read by nothing, here as there:
``SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS``. So are the keys of Detectron2's DeepLab head that some
recipes set (``SEM_SEG_HEAD.ASPP_*``, ``PROJECT_*``, ``LOSS_TYPE``, ``USE_DEPTHWISE_SEPARABLE_CONV``).
The keys at the end, which the published model lacks, are off by default.
"""

from detectron2.config import CfgNode

__all__ = ["add_maskformer2_config", "get_default_config"]


def get_default_config() -> CfgNode:
    """Detectron2's defaults with DeepLab's and Mask2Former's keys added, as ``train_net.py`` starts from."""
    from detectron2.config import get_cfg
    from detectron2.projects.deeplab import add_deeplab_config

    cfg = get_cfg()
    add_deeplab_config(cfg)
    add_maskformer2_config(cfg)
    return cfg


def add_maskformer2_config(cfg: CfgNode) -> None:
    """Add every Mask2Former key with its default to ``cfg``, in place.

    Call it after ``detectron2.projects.deeplab.add_deeplab_config``, whose polynomial schedule keys
    the published recipes use too.
    """
    _add_input_keys(cfg)
    _add_solver_keys(cfg)
    _add_model_keys(cfg)
    _add_swin_keys(cfg)
    _add_own_keys(cfg)


def _add_input_keys(cfg: CfgNode) -> None:
    # Which row of the mapper table (mask2former/data/mapper.py) makes training samples. Any other name stands for
    # Detectron2's mapper, with a warning.
    cfg.INPUT.DATASET_MAPPER_NAME = "mask_former_semantic"
    # Random brightness, contrast, saturation and hue as in SSD, in the mask_former_* mappers.
    cfg.INPUT.COLOR_AUG_SSD = False
    # Crop again while one class takes more than this share of the crop (1.0: any crop will do).
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 1.0
    # Pad training pictures to a multiple of this many pixels, with grey and the ignore label (-1: leave them), in the
    # mask_former_* mappers.
    cfg.INPUT.SIZE_DIVISIBILITY = -1

    # Large-scale jitter of the coco_*_lsj mappers: the side of the square crop in pixels, and the
    # range of the scale factor relative to it.
    cfg.INPUT.IMAGE_SIZE = 1024
    cfg.INPUT.MIN_SCALE = 0.1
    cfg.INPUT.MAX_SCALE = 2.0


def _add_solver_keys(cfg: CfgNode) -> None:
    # "ADAMW" or "SGD".
    cfg.SOLVER.OPTIMIZER = "ADAMW"
    # Weight decay of embeddings (queries, level embeddings); norms have SOLVER.WEIGHT_DECAY_NORM.
    cfg.SOLVER.WEIGHT_DECAY_EMBED = 0.0
    # The backbone's learning rate as a share of SOLVER.BASE_LR.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1


def _add_model_keys(cfg: CfgNode) -> None:
    mask_former = cfg.MODEL.MASK_FORMER = CfgNode()

    # Losses (paper section 3.2.2): on every decoder layer's prediction, or on the last one alone.
    mask_former.DEEP_SUPERVISION = True
    # Weight of the "no object" class in the classification loss.
    mask_former.NO_OBJECT_WEIGHT = 0.1
    # Weights of the losses, and of the same terms in the matching cost.
    mask_former.CLASS_WEIGHT = 1.0
    mask_former.DICE_WEIGHT = 1.0
    mask_former.MASK_WEIGHT = 20.0
    # Points at which a mask's losses and matching costs are computed (paper: 12,544 = 112 x 112).
    mask_former.TRAIN_NUM_POINTS = 112 * 112
    # The losses draw OVERSAMPLE_RATIO times as many points uniformly, keep the IMPORTANCE_SAMPLE_RATIO
    # share of TRAIN_NUM_POINTS where the mask is least certain, and draw the rest uniformly again.
    mask_former.OVERSAMPLE_RATIO = 3.0
    mask_former.IMPORTANCE_SAMPLE_RATIO = 0.75

    # Transformer decoder.
    mask_former.TRANSFORMER_DECODER_NAME = "MultiScaleMaskedTransformerDecoder"
    # PerPixelBaselinePlusHead has no classes: its queries are the classes, so as many as NUM_CLASSES there.
    mask_former.NUM_OBJECT_QUERIES = 100
    mask_former.HIDDEN_DIM = 256
    mask_former.NHEADS = 8
    mask_former.DIM_FEEDFORWARD = 2048
    # DEC_LAYERS counts predictions. MultiScaleMaskedTransformerDecoder makes one before its first layer and one after
    # each, so 10 stands for 9 layers; StandardTransformerDecoder makes one after each.
    mask_former.DEC_LAYERS = 6
    mask_former.PRE_NORM = False
    # Read by StandardTransformerDecoder (encoder layers before its decoder) and by the transformer
    # encoder of the pixel decoders. MultiScaleMaskedTransformerDecoder has no dropout (paper section 3.2.1).
    mask_former.ENC_LAYERS = 0
    mask_former.DROPOUT = 0.1
    # Which feature the transformer decoder attends to: "multi_scale_pixel_decoder",
    # "transformer_encoder", "pixel_embedding", or a backbone feature such as "res5".
    mask_former.TRANSFORMER_IN_FEATURE = "res5"
    # A 1x1 convolution on the decoder's input even where the widths already agree.
    mask_former.ENFORCE_INPUT_PROJ = False

    # Pictures of a batch are padded to a multiple of this, in pixels (-1: what the backbone asks for).
    mask_former.SIZE_DIVISIBILITY = 32

    # Inference: which outputs are made.
    test = mask_former.TEST = CfgNode()
    test.SEMANTIC_ON = True
    test.INSTANCE_ON = False
    test.PANOPTIC_ON = False
    # Panoptic: queries with a lower class score are left out.
    test.OBJECT_MASK_THRESHOLD = 0.0
    # Panoptic: a segment of which a smaller share than this is visible is left out.
    test.OVERLAP_THRESHOLD = 0.0
    # Semantic: resize masks to the output size before they are summed into class scores. Always so
    # where panoptic or instance output is on.
    test.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE = False

    # Pixel decoder.
    head = cfg.MODEL.SEM_SEG_HEAD
    head.PIXEL_DECODER_NAME = "BasePixelDecoder"
    # Width of the mask features and mask embeddings.
    head.MASK_DIM = 256
    # Transformer encoder layers in the pixel decoder.
    head.TRANSFORMER_ENC_LAYERS = 0
    # MSDeformAttnPixelDecoder: the features its encoder sees.
    head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES = ["res3", "res4", "res5"]
    # Its sampling points for each head and level. The published code defines the key and has the constant 4.
    head.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS = 4
    # Read by nothing, as in the published code: MASK_FORMER.NHEADS is the encoder's number of heads too.
    head.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS = 8


def _add_swin_keys(cfg: CfgNode) -> None:
    # D2SwinTransformer, the Swin backbone. The defaults are Swin-T's.
    swin = cfg.MODEL.SWIN = CfgNode()
    # Side of the pictures it was pretrained on, in pixels: the size of the absolute position embedding.
    swin.PRETRAIN_IMG_SIZE = 224
    # Side of a patch, in pixels, and channels of its embedding; each further stage has half the side and twice these.
    swin.PATCH_SIZE = 4
    swin.EMBED_DIM = 96
    # Blocks and attention heads of each stage.
    swin.DEPTHS = [2, 2, 6, 2]
    swin.NUM_HEADS = [3, 6, 12, 24]
    # Side of an attention window, in patches.
    swin.WINDOW_SIZE = 7
    # Width of the hidden layer of the blocks' MLPs, relative to the block's.
    swin.MLP_RATIO = 4.0
    swin.QKV_BIAS = True
    # Factor of the attention logits (None: 1 / sqrt of a head's width).
    swin.QK_SCALE = None
    # Dropout of projections and MLPs, of attention weights, and of whole blocks (growing from 0 to this in the last).
    swin.DROP_RATE = 0.0
    swin.ATTN_DROP_RATE = 0.0
    swin.DROP_PATH_RATE = 0.3
    # Add an absolute position embedding to the patches.
    swin.APE = False
    # Norm the patch embeddings.
    swin.PATCH_NORM = True
    swin.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    # Compute activations a second time in the backward pass instead of keeping them: less memory, more time.
    swin.USE_CHECKPOINT = False


def _add_own_keys(cfg: CfgNode) -> None:
    """Keys that the published model lacks. With these defaults nothing differs from it."""
    # Width of the hidden layer in MSDeformAttnPixelDecoder's encoder (a constant in the published code).
    cfg.MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_DIM_FEEDFORWARD = 1024

    # Divide losses by what the batch of all processes holds, so that gradients don't depend on how many processes share
    # it. False, as published: the class loss is averaged in each process, and its means over the processes, so that a
    # picture's weight depends on the pictures beside it; and mask losses are divided by at least one object a process.
    cfg.MODEL.MASK_FORMER.NORMALIZE_OVER_RANKS = False

    # Parts that compute what is inside their layers once more in the backward pass instead of keeping it: less memory,
    # more time. Some of "backbone", "pixel_decoder", "transformer_decoder". MODEL.SWIN.USE_CHECKPOINT, which is
    # published, does the same as "backbone". Not for Detectron2's SemanticSegmentor (the per-pixel baselines).
    cfg.MODEL.MASK_FORMER.ACTIVATION_CHECKPOINTING = []

    test = cfg.MODEL.MASK_FORMER.TEST
    # Instances with a lower score are left out of the instance output.
    test.INSTANCE_SCORE_THRESHOLD = 0.0
    # Mask NMS: an instance whose mask overlaps a better one of its class by more than this IoU is
    # left out (1.0: off). For many equal objects, where queries repeat one another.
    test.MASK_NMS_THRESHOLD = 1.0
    # Semantic output is the best class of each pixel, int32 (H, W), in place of scores (K, H, W), which for large
    # pictures are most of the memory. Evaluation by train_net.py and the demo, which need no scores, ask for it by
    # themselves; test-time augmentation, which averages scores, makes labels of the mean. Detectron2's
    # SemanticSegmentor (the per-pixel baselines) gives scores in any case.
    test.SEMANTIC_LABELS = False
    # Inference in overlapping square tiles of this side, in pixels of the network's input (0: off).
    # Neighbouring tiles share TILE_OVERLAP pixels; objects wider than that may be cut.
    test.TILE_SIZE = 0
    test.TILE_OVERLAP = 128
    # Tiles that go through the network together.
    test.TILE_BATCH_SIZE = 4
    # Inference in bfloat16, but for what must be exact: faster, for a little of the accuracy. Only on a GPU or CPU that
    # has units for it; others are refused, since they would be slower. Training stays as it is (SOLVER.AMP), and so
    # does Detectron2's SemanticSegmentor (the per-pixel baselines).
    test.BFLOAT16 = False

    # Resize test pictures by this factor (0: to INPUT.MIN_SIZE_TEST / MAX_SIZE_TEST, as Detectron2 does).
    # For pictures whose objects have a size in pixels, whatever the picture's own size: microscopy, aerial.
    cfg.INPUT.SCALE_TEST = 0.0

    # MODEL.BACKBONE.NAME "TimmBackbone": any of timm's models that gives feature maps at strides 4, 8, 16 and 32.
    timm = cfg.MODEL.TIMM = CfgNode()
    timm.NAME = "efficientnet_lite0"
    timm.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    # Batch norm: "BN" (trained), "FrozenBN", or "folded" (its ImageNet statistics become part of the convolutions).
    timm.NORM = "FrozenBN"
    # Epsilon of the batch norms (None: timm's).
    timm.BN_EPS = None

    # Share of the training samples that objects of another sample are pasted on (mask2former/data/copy_paste.py).
    cfg.INPUT.COPY_PASTE_PROBABILITY = 0.0

    # Keep the weights that are best by this metric of the evaluation, such as "segm/AP" or "panoptic_seg/PQ", as
    # model_best.pth ("": don't).
    cfg.TEST.BEST_METRIC = ""
    # End the run when so many evaluations in a row were no better by TEST.BEST_METRIC (0: off).
    cfg.SOLVER.EARLY_STOPPING_PATIENCE = 0
    # Average the weights over the steps with this decay, evaluate the average, and save it as model_ema.pth (0: off).
    # The steps that count are about the last 1 / (1 - decay).
    cfg.SOLVER.EMA_DECAY = 0.0
    # Parts into which each process's share of SOLVER.IMS_PER_BATCH is split, that go through the model one after the
    # other: less memory, and the same step (mask2former/engine/accumulation.py says what differs).
    cfg.SOLVER.ACCUMULATION_STEPS = 1
    # Spread the optimizer's state over the processes of the run (ZeRO, stage 1): each keeps 1 / N of AdamW's 8 bytes a
    # parameter. The steps are the same, and checkpoints go on with any number of processes, sharded or not.
    cfg.SOLVER.SHARD_OPTIMIZER = False
    # The batch size that the recipe's numbers are for (0: whatever SOLVER.IMS_PER_BATCH is). With another IMS_PER_BATCH
    # the learning rate is scaled in proportion, and MAX_ITER, STEPS, WARMUP_ITERS and the periods of evaluation and
    # checkpoints inversely, as Detectron2 does by SOLVER.REFERENCE_WORLD_SIZE, which scales IMS_PER_BATCH too.
    cfg.SOLVER.REFERENCE_BATCH_SIZE = 0

    # Checkpoints of a run that are kept (0: all); when there is one more, the oldest is removed. model_final.pth,
    # model_best.pth and model_ema.pth don't count.
    cfg.SOLVER.CHECKPOINTS_TO_KEEP = 0

    # Project of Weights & Biases that gets the run's figures ("": none). It needs the package wandb.
    cfg.WANDB_PROJECT = ""

    # The user's own data sets, which train_net.py --train-data writes here: a dict for each, see mask2former/data/own.
    cfg.DATASETS.OWN = []
