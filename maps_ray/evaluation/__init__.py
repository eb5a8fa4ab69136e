"""What a robot does with a policy: simulators, experts, rollouts."""
