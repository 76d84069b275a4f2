"""What the namespace tests share: namespaces, a topology, the daemon in it, and waiting."""
