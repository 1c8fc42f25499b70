"""Attention modules, each usable alone on maps."""

from .agent import AgentAttention2d, AgentTokenAttention, agent_attention_untrained, attend_untrained
from .aggregated import AggregatedAttention2d, UnitGlobalAttention2d
from .cbam import CBAM
from .context_broadcasting import broadcast_context
from .contmix import ContextMixing, ContextMixing2d, ContMixBlock
from .create import create_attention, list_attentions
from .cross_axis import CrossAxisAttention2d
from .cross_shaped import CrossShapedAttention2d
from .das import DeformableGate
from .deformable import DeformableAttention2d
from .dilated_reparam import DilatedReparamConv
from .dual import ChannelGroupAttention2d, DualAttention2d
from .ela import EfficientLocalAttention
from .global_attention import GlobalAttention2d
from .hamburger import Hamburger2d
from .hilo import HiLoAttention2d
from .inline import InLineAttention2d, InLineTokenAttention
from .large_kernel import DilatedGate, LargeKernelAttention2d, StripGate
from .losses import collect_losses, report_logits, report_loss
from .mixture_of_heads import HeadRouter, MixtureOfHeads2d
from .multi_scale_deformable import MultiScaleDeformableAttention
from .neighborhood import NeighborhoodAttention1d, NeighborhoodAttention2d, NeighborhoodAttention3d
from .polarized import PolarizedAttention
from .quadtree import QuadTreeAttention2d
from .quadtree_cross import QuadTreeCrossAttention2d
from .routing import BiLevelRoutingAttention2d, LePEAttention2d, RoutedRegions
from .shift import Shift2d
from .subspace import SubspaceAttention
from .token_merging import TokenMatching, match_tokens
from .triplet import TripletAttention
from .window import WindowAttention2d

__all__ = [
    "CBAM",
    "AgentAttention2d",
    "AgentTokenAttention",
    "AggregatedAttention2d",
    "BiLevelRoutingAttention2d",
    "ChannelGroupAttention2d",
    "ContMixBlock",
    "ContextMixing",
    "ContextMixing2d",
    "CrossAxisAttention2d",
    "CrossShapedAttention2d",
    "DeformableAttention2d",
    "DeformableGate",
    "DilatedGate",
    "DilatedReparamConv",
    "DualAttention2d",
    "EfficientLocalAttention",
    "GlobalAttention2d",
    "Hamburger2d",
    "HeadRouter",
    "HiLoAttention2d",
    "InLineAttention2d",
    "InLineTokenAttention",
    "LargeKernelAttention2d",
    "LePEAttention2d",
    "MixtureOfHeads2d",
    "MultiScaleDeformableAttention",
    "NeighborhoodAttention1d",
    "NeighborhoodAttention2d",
    "NeighborhoodAttention3d",
    "PolarizedAttention",
    "QuadTreeAttention2d",
    "QuadTreeCrossAttention2d",
    "RoutedRegions",
    "Shift2d",
    "StripGate",
    "SubspaceAttention",
    "TokenMatching",
    "TripletAttention",
    "UnitGlobalAttention2d",
    "WindowAttention2d",
    "agent_attention_untrained",
    "attend_untrained",
    "broadcast_context",
    "collect_losses",
    "create_attention",
    "list_attentions",
    "match_tokens",
    "report_logits",
    "report_loss",
]
