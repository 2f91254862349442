"""The rank of every site of a run, or of any adapter folder in PEFT's format, read without torch."""

from rankwise.reports.ranks.folders import read
from rankwise.reports.ranks.maps import RankMap, SiteRank, believed_and_measured, of_run
from rankwise.reports.ranks.sites import module_labels, site_order, split_site

__all__ = ["RankMap", "SiteRank", "believed_and_measured", "module_labels", "of_run", "read", "site_order", "split_site"]
