#include <netdb.h>
#include <sys/un.h>

#include "ssh/ssh.h"
#include "util/cleanup.h"
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

/* Why there is no address, and what to do about it. */
static const char *ssh_config_explain(const struct vm *vm) {
    switch (vm->state) {
    case VM_BOOTING:
        return "`echo running > status` waits until it runs";
    case VM_STOPPING:
    case VM_STOPPED:
        return "`echo running > status` starts it";
    case VM_FAILED:
        return "its `error` says why, `echo running > status` starts it again";
    default:
        return "its `error` says more";
    }
}

/* An empty file would have ssh look for a host of this name elsewhere, and perhaps find one. */
static void ssh_config_print_nowhere(const struct vm *vm, struct buf *out) {
    cleanup_buf struct buf words = {0};
    buf_printf(&words, "vmsfs: %s is %s: %s", vm->id, vm_state_name(vm->state),
               ssh_config_explain(vm));
    buf_append_str(out, "    ProxyCommand sh -c 'echo \"$1\" >&2; exit 1' sh ");
    ssh_config_quote(words.data ? words.data : "", out);
    buf_append_str(out, "\n    LogLevel QUIET\n"); /* these words alone */
}

void vm_ssh_config(const struct vm *vm, struct buf *out) {
    struct ssh_target target;
    cleanup_buf struct buf place = {0};
    buf_printf(out, "Host %s\n", vm->id);
    if (!vm_target(vm, &target) || !target.host_key_length ||
        !ssh_config_print_place(vm, &target, &place) || place.failed) {
        ssh_config_print_nowhere(vm, out);
        return;
    }
    buf_printf(out,
               "%s"
               "    User %s\n"
               "    HostKeyAlias %s\n"
               "    IdentityFile \"%s\"\n"
               "    IdentitiesOnly yes\n"
               "    UserKnownHostsFile \"%s/known_hosts\"\n"
               "    StrictHostKeyChecking yes\n"
               "    LogLevel ERROR\n",
               place.data, vm->user, vm->id, target.key_path, vm->dir);
}
