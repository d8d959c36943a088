#include <netdb.h>
#include <sys/un.h>

#include "ssh/ssh.h"
#include "vm/target.h"
#include "vm/vm.h"

/* A word of a ProxyCommand: ssh replaces what begins with `%`, and gives the rest to a shell. */
static void ssh_config_quote(const char *word, struct buf *out) {
    buf_append_char(out, '\'');
    for (; *word; word++)
        buf_append_str(out, *word == '\'' ? "'\\''" : *word == '%' ? "%%" : (char[]){*word, '\0'});
    buf_append_char(out, '\'');
}

/* Where ssh finds the guest. */
static bool ssh_config_print_place(const struct vm *vm, const struct ssh_target *target,
                                   struct buf *out) {
    char host[NI_MAXHOST], port[NI_MAXSERV];
    if (target->vsock_port) {
        const struct sockaddr_un *address =
            (const struct sockaddr_un *)(const void *)&target->address;
        buf_append_str(out, "    ProxyCommand ");
        ssh_config_quote(vm->daemon->settings.program, out);
        buf_append_str(out, " --connect ");
        ssh_config_quote(address->sun_path, out);
        buf_printf(out, " %u\n", target->vsock_port);
        return true;
    }
    if (getnameinfo((const struct sockaddr *)&target->address, target->address_length, host,
                    sizeof host, port, sizeof port, NI_NUMERICHOST | NI_NUMERICSERV) != 0)
        return false;
    buf_printf(out, "    HostName %s\n    Port %s\n", host, port);
    return true;
}

bool vm_ssh_config(const struct vm *vm, struct buf *out) {
    struct ssh_target target;
    if (!vm_target(vm, &target) || !target.host_key_length)
        return false;
    buf_printf(out, "Host %s\n", vm->id);
    if (!ssh_config_print_place(vm, &target, out))
        return false;
    buf_printf(out,
               "    User %s\n"
               "    HostKeyAlias %s\n"
               "    IdentityFile \"%s\"\n"
               "    IdentitiesOnly yes\n"
               "    UserKnownHostsFile \"%s/known_hosts\"\n"
               "    StrictHostKeyChecking yes\n"
               "    LogLevel ERROR\n",
               vm->user, vm->id, target.key_path, vm->dir);
    return !out->failed;
}
