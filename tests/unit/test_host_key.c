#include <errno.h>

#include "check.h"
#include "util/cleanup.h"
#include "util/errors.h"
#include "util/fs.h"
#include "vm/host_key.h"

/* Of the form of keys; nobody has the private parts. */
#define ED25519_BLOB "AAAAC3NzaC1lZDI1NTE5AAAAIHRoaXJ0eS10d28gYnl0ZXMgdGhhdCBhcmUgYSBrZXkh"
#define ED25519 "ssh-ed25519 " ED25519_BLOB
#define OTHER "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGFuZCB0aGUgdGhpcnR5LXR3byBieXRlcyBvZiBtb3Jl"
#define RSA "ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAAAAwEAAQ=="

/* Reads as this key. */
static void is(const char *text, const char *key) {
    cleanup_buf struct buf blob = {0}, printed = {0};
    const char *wrong = NULL;
    CHECK_SAID(host_key_parse(text, strlen(text), &blob, &wrong) == 0, "%s: %s", text, wrong);
    host_key_print(blob.data, blob.len, &printed);
    CHECK_SAID(check_same(printed.data, printed.len, key, strlen(key)), "%s is read as %.*s", text,
               (int)printed.len, printed.data);
}

static void is_none(const char *text, size_t length, const char *word) {
    cleanup_buf struct buf blob = {0};
    const char *wrong = NULL;
    CHECK_SAID(host_key_parse(text, length, &blob, &wrong) == -ERR_INVALID, "%s", text);
    CHECK_SAID(blob.len == 0 && wrong && strstr(wrong, word), "%s: %s", text, wrong);
}

static void a_pub_file_is_a_key(void) {
    is(ED25519, ED25519);
    is(ED25519 "\n", ED25519);
    is(ED25519 " root@host\r\n", ED25519);
    is("\n# comment\n \t" ED25519 "\n", ED25519);
}

static void a_known_hosts_file_is_a_key(void) {
    is("host,192.0.2.1 " ED25519, ED25519);
    is("[host]:2222 " ED25519 " comment\n", ED25519);
    is("|1|F1E1KeoE/eEWhi10WpGv4OdiO6Y=|3988QV0VE8wmZL7suNrYQLITLCg= " ED25519 "\n", ED25519);
    is("@revoked * " OTHER "\nhost " ED25519 "\n", ED25519);
}

static void of_several_types_the_best_is_taken(void) {
    is("host " RSA "\nhost " ED25519 "\n", ED25519);
    is("host " ED25519 "\nhost " RSA "\n", ED25519);
    is("host " RSA "\n", RSA);
    is("a " ED25519 "\nb " ED25519 "\n", ED25519);
    static const char two[] = "a " ED25519 "\nb " OTHER "\n";
    is_none(two, sizeof two - 1, "several");
    static const char both[] = "a " ED25519 "\nb " OTHER "\nc " ED25519 "\n";
    is_none(both, sizeof both - 1, "several");
}

static void what_is_no_key_is_refused(void) {
    static const char *const texts[] = {
        "",
        "\n\n",
        "# only a comment",
        "@revoked * " ED25519,
        "ssh-ed25519",
        "ssh-ed25519 ",
        "ssh-ed25519 AAAA",
        "host ssh-ed25519",
        ("ssh-rsa " ED25519_BLOB), /* the name is not that of the blob */
        "ssh-ed25519 not-base64!",
        "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAA\n",
    };
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        is_none(texts[i], strlen(texts[i]), "no public key");
    static const char text[] = ED25519;
    for (size_t n = 0; n < 20; n++) /* cut within the type */
        is_none(text, n, "no public key");
}

/* RFC 4648, section 10. */
static void base64_is_that_of_the_rfc(void) {
    static const char *const pairs[][2] = {{"", ""},
                                           {"f", "Zg=="},
                                           {"fo", "Zm8="},
                                           {"foo", "Zm9v"},
                                           {"foob", "Zm9vYg=="},
                                           {"fooba", "Zm9vYmE="},
                                           {"foobar", "Zm9vYmFy"},
                                           {"\xff\xfe\xfd", "//79"}};
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++) {
        cleanup_buf struct buf text = {0}, back = {0};
        base64_encode(pairs[i][0], strlen(pairs[i][0]), &text);
        CHECK_SAID(check_same(text.data, text.len, pairs[i][1], strlen(pairs[i][1])), "%s: %s",
                   pairs[i][0], text.data);
        CHECK(base64_decode(pairs[i][1], strlen(pairs[i][1]), &back) == 0);
        CHECK(check_same(back.data, back.len, pairs[i][0], strlen(pairs[i][0])));
    }
}

int main(void) {
    a_pub_file_is_a_key();
    a_known_hosts_file_is_a_key();
    of_several_types_the_best_is_taken();
    what_is_no_key_is_refused();
    base64_is_that_of_the_rfc();
    return check_end();
}
