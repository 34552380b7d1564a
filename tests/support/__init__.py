"""What tests share: builders of small checkpoints, servers and processes to talk to, things that attack them."""
