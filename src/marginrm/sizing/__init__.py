"""How many replicas a load needs: a queueing model of one replica, and a simulation of a fleet of them."""
