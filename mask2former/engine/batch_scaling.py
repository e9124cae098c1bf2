"""A recipe's numbers for another batch size than the one they were found with."""

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm
from omegaconf import DictConfig

from ..errors import UserError

__all__ = ["scale_lazy_to_batch", "scale_to_batch"]


def scale_to_batch(cfg: CfgNode) -> CfgNode:
    """The config with its learning rate, steps and periods scaled, if it asks for that.

    From ``SOLVER.REFERENCE_BATCH_SIZE`` to ``SOLVER.IMS_PER_BATCH``; or, as everywhere in Detectron2, from
    ``SOLVER.REFERENCE_WORLD_SIZE`` to the number of processes, ``IMS_PER_BATCH`` too. The result's reference is what
    it was scaled to, so that it stays as it is.

    Raises:
        UserError: if the references don't go together, or with the batch size.
    """
    solver = cfg.SOLVER
    batch, reference, processes = solver.IMS_PER_BATCH, solver.REFERENCE_BATCH_SIZE, solver.REFERENCE_WORLD_SIZE
    if not reference and not processes:
        return cfg
    _check_reference("SOLVER.REFERENCE_BATCH_SIZE", reference)
    if reference and processes:
        raise UserError(
            f"SOLVER.REFERENCE_BATCH_SIZE is {reference} and SOLVER.REFERENCE_WORLD_SIZE {processes}: set one of them"
        )
    if processes and (processes < 0 or batch % processes):
        raise UserError(
            f"SOLVER.REFERENCE_WORLD_SIZE is {processes}, expected a number that divides SOLVER.IMS_PER_BATCH, {batch}"
        )
    if reference:  # as if each process had one picture
        cfg = cfg.clone()
        cfg.defrost()
        cfg.SOLVER.IMS_PER_BATCH = cfg.SOLVER.REFERENCE_WORLD_SIZE = reference
    scaled = DefaultTrainer.auto_scale_workers(cfg, batch if reference else comm.get_world_size()).clone()
    scaled.defrost()
    scaled.SOLVER.CHECKPOINT_PERIOD = max(scaled.SOLVER.CHECKPOINT_PERIOD, 1)
    if cfg.TEST.EVAL_PERIOD:
        scaled.TEST.EVAL_PERIOD = max(scaled.TEST.EVAL_PERIOD, 1)
    if reference:
        scaled.SOLVER.REFERENCE_BATCH_SIZE, scaled.SOLVER.REFERENCE_WORLD_SIZE = batch, 0
    scaled.freeze()
    return scaled


def scale_lazy_to_batch(cfg: DictConfig) -> None:
    """The same in place for a LazyConfig, from ``train.reference_batch_size`` to the loader's ``total_batch_size``.

    Its schedule is in shares of ``train.max_iter``.
    """
    reference = cfg.train.get("reference_batch_size", 0)
    if not reference:
        return
    _check_reference("train.reference_batch_size", reference)
    batch = cfg.dataloader.train.total_batch_size
    scale = batch / reference
    cfg.optimizer.base_lr *= scale
    cfg.train.max_iter = round(cfg.train.max_iter / scale)
    if cfg.train.eval_period:
        cfg.train.eval_period = max(round(cfg.train.eval_period / scale), 1)
    cfg.train.checkpointer.period = max(round(cfg.train.checkpointer.period / scale), 1)
    cfg.train.reference_batch_size = batch


def _check_reference(key: str, value: int) -> None:
    if value < 0:
        raise UserError(f"{key} is {value}, expected the batch size that the recipe's numbers are for, or 0")
