"""The rank of every site of a run, or of any adapter folder in PEFT's format, read without torch."""

from rankwise.reports.ranks.folders import read
from rankwise.reports.ranks.maps import RankMap, SiteRank, of_run, with_loss_increase
from rankwise.reports.ranks.sites import module_labels, site_order, split_site

__all__ = ["RankMap", "SiteRank", "module_labels", "of_run", "read", "site_order", "split_site", "with_loss_increase"]
