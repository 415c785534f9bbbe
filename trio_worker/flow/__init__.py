"""What flows between tasks: core's decisions with the waiting that belongs to them."""
