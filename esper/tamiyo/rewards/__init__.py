"""What a decision has earned: measured against a control, in parts, over horizons."""

from esper.tamiyo.rewards.branch import Branch, Outcome
from esper.tamiyo.rewards.config import RewardConfig
from esper.tamiyo.rewards.reward import HorizonReward, Reward, RewardComputer

__all__ = ["Branch", "HorizonReward", "Outcome", "Reward", "RewardComputer", "RewardConfig"]
