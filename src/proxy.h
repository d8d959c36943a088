#pragma once

/* What ssh runs as the ProxyCommand of a VM that is reached by vsock (vm_ssh_config): connects to
 * the VMM's UNIX socket, asks for the guest's port, and passes on stdin and stdout until both are
 * at their end. Returns an exit status. */
int proxy_run(const char *socket, const char *port);
