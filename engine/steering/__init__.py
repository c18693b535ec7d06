"""Networks beside a model that see pictures: ControlNets, IP-Adapters with image encoders."""
