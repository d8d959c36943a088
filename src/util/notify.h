#pragma once

/* Tells the service manager, if one has asked for it by $NOTIFY_SOCKET (sd_notify(3): a datagram
 * of NAME=VALUE lines to that socket, an abstract one when it begins with @). 0 or -errno; 0 when
 * nobody has asked. */
int service_notify(const char *state);
