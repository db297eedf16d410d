"""The compute multiplier as a budget: how many rollouts a step may spend, and on which items.

`uniform`: every item gets max(2, round(base x multiplier)) rollouts. `adaptive`: the same number in all, in two
rounds. Every item first gets a few. One whose grades are then all equal teaches nothing: it gets no more, and a
further item of the dataset is tried in its place. What is left goes, in equal parts, to the items whose grades vary.

Why that does not push the policy in a wrong direction: whether an item gets a second round depends only on its first
round, and a rollout's baseline only on other rollouts of its own and earlier rounds (`objective.advantages`;
leave-one-out as in Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"). Given the first round, the
second is a fresh sample, so its estimate has the item's gradient g as its mean; the first round's estimate g1 has mean
g too, and is exactly 0 where its grades are equal, so leaving these items out changes nothing. The expected update of
an item is therefore (w1 + w2 P[its grades vary]) g, w1 and w2 the rounds' weights: a positive multiple of g. As with
every rule that drops groups without signal (DAPO's dynamic sampling, arXiv:2503.14476), items that vary more often
weigh more. One mean over both rounds would not have this property: first-round baselines would then depend on a round
that exists only because of what these very rollouts were. Dividing by a group's standard deviation is biased in either
case, as everywhere.
"""

from __future__ import annotations


class StepBudget:
    """The rollouts of one step, spent as items turn out to vary or not. `spent` never exceeds `total`."""

    def __init__(self, total: int, first: int) -> None:
        if not 2 <= first <= total:
            raise ValueError(f"a first round of {first} rollouts does not fit into a budget of {total}, or is below 2")
        self.total, self.first, self.spent = total, first, 0

    def take_first(self) -> bool:
        """Spend a first round, where enough is left for one."""
        if self.spent + self.first > self.total:
            return False
        self.spent += self.first
        return True

    def split_rest(self, num_items: int) -> list[int]:
        """What is left, for `num_items` items in parts that differ by at most one; spent when there are any items."""
        if num_items == 0:
            return []
        share, extra = divmod(self.total - self.spent, num_items)
        self.spent = self.total
        return [share + (index < extra) for index in range(num_items)]
