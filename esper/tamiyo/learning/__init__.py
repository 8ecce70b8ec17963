"""Learning to decide: value models fitted to tried candidates, and decoupled PPO with prioritised replay."""
