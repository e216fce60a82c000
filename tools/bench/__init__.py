"""The suite of all benches, and the peers that run beside them in processes of their own."""
