#include <errno.h>

#include "check.h"
#include "guest/env_file.h"
#include "util/cleanup.h"

#define HEADER "#!/bin/sh\n# Environment variables managed by vmsfs\n"
#define S(literal) literal, sizeof(literal) - 1

/* All of them must be installed: the parser's promise is about these. */
static const char *const shells[] = {"dash", "bash", "busybox sh"};

static char path[] = "/tmp/vmsfs-test-env-XXXXXX";

/* --- Helpers --- */

/* Gathers variables as `NAME=value` with a NUL behind each. */
static int gather(void *arg, const struct env_var *var) {
    struct buf *all = arg;
    buf_append(all, var->name, var->name_length);
    buf_append_char(all, '=');
    buf_append(all, var->value, var->length);
    buf_append_char(all, '\0');
    return 0;
}

static void path_write(const char *bytes, size_t length) {
    FILE *f = fopen(path, "w");
    CHECK(f && fwrite(bytes, 1, length, f) == length && !fclose(f));
}

/* What a shell has in `name` after sourcing the file at `path`. */
static struct buf shell_value(const char *shell, const char *name) {
    cleanup_buf struct buf command = {0};
    struct buf value = {0};
    buf_printf(&command, "env -i PATH=\"$PATH\" HOME=/home/x %s -c '. %s; printf %%s \"$%s\"'",
               shell, path, name);
    FILE *f = popen(command.data, "r");
    char block[4096];
    for (size_t n; f && (n = fread(block, 1, sizeof block, f));)
        buf_append(&value, block, n);
    CHECK_SAID(f && pclose(f) == 0, "%s failed on the file", shell);
    return value;
}

#define LIST_MOST 16

/* What was gathered, in the order of the names, of each the last. Returns how many. */
static size_t sorted(struct env_var *list, const struct buf *gathered) {
    size_t count = 0;
    for (size_t at = 0; at < gathered->len; at += strlen(gathered->data + at) + 1) {
        const char *name = gathered->data + at, *value = strchr(name, '=') + 1;
        size_t length = (size_t)(value - name), place = 0; /* with the `=` */
        while (place < count && strncmp(list[place].name, name, length) < 0)
            place++;
        if (place == count || strncmp(list[place].name, name, length) != 0) {
            CHECK(count < LIST_MOST);
            memmove(&list[place + 1], &list[place], (count++ - place) * sizeof *list);
        }
        list[place] = (struct env_var){name, length - 1, value, strlen(value)};
    }
    return count;
}

static void formatted_again(const char *text, const struct buf *vars, const struct buf *kept) {
    struct env_var list[LIST_MOST + 1], list_again[LIST_MOST + 1];
    size_t count = sorted(list, vars);
    cleanup_buf struct buf file = {0}, again = {0}, again_kept = {0}, again_file = {0};
    env_file_format(&file, list, count, kept->data, kept->len);
    CHECK(!env_file_parse(file.data, file.len, gather, &again, &again_kept));
    CHECK_SAID(check_same(kept->data, kept->len, again_kept.data, again_kept.len),
               "other lines are kept after <%s> was written as <%s>", text, file.data);
    size_t count_again = sorted(list_again, &again);
    CHECK_SAID(count == count_again, "<%s> was written as <%s>", text, file.data);
    for (size_t i = 0; i < count && i < count_again; i++)
        CHECK_SAID(!strcmp(list[i].name, list_again[i].name), /* and the values */
                   "not the same after <%s> was written as <%s>", text, file.data);
    env_file_format(&again_file, list_again, count_again, again_kept.data, again_kept.len);
    CHECK_SAID(check_same(file.data, file.len, again_file.data, again_file.len), "<%s> and <%s>",
               file.data, again_file.data);
}

/* Text is read as these variables (each with a NUL behind it) and this `kept`, now and after being
 * written. */
static void reads(int line, const char *text, size_t length, const char *vars, size_t vars_length,
                  const char *kept) {
    cleanup_buf struct buf got = {0}, got_kept = {0};
    int status = env_file_parse(text, length, gather, &got, &got_kept);
    check_at(__FILE__, line, status == 0, "status %d", status);
    check_at(__FILE__, line, check_same(got.data, got.len, vars, vars_length),
             "variables of <%s> are <%s> and %zu bytes", text, got.data ? got.data : "", got.len);
    check_at(__FILE__, line, check_same(got_kept.data, got_kept.len, kept, strlen(kept)),
             "of <%s> is kept <%s>", text, got_kept.data ? got_kept.data : "");
    formatted_again(text, &got, &got_kept);
}

#define READS(text, vars, kept) reads(__LINE__, S(text), S(vars), kept)
/* Lines of others, complete: what follows them is read. */
#define FOREIGN(text) reads(__LINE__, S(text "export AFTER=1\n"), S("AFTER=1\0"), text)

/* --- Tests --- */

static void names(void) {
    char name[257];
    memset(name, 'a', sizeof name);
    CHECK(env_name_is_valid(name, 255) && !env_name_is_valid(name, 256));
    CHECK(env_name_is_valid(S("A")) && env_name_is_valid(S("_")) && env_name_is_valid(S("a1_Z9")));
    CHECK(!env_name_is_valid("", 0) && !env_name_is_valid(S("1A")) && !env_name_is_valid(S("A-B")));
    CHECK(!env_name_is_valid(S("A\0")) && !env_name_is_valid(S("A ")) &&
          !env_name_is_valid(S("\xc3\xa4")));
}

static void a_written_file_looks_as_documented(void) {
    struct env_var vars[] = {{S("A"), S("it's")}, {S("B"), S("")}};
    cleanup_buf struct buf file = {0};
    env_file_format(&file, vars, 2, S("# mine"));
    static const char expected[] = HEADER "export A='it'\\''s'\nexport B=''\n# mine\n";
    CHECK_SAID(check_same(file.data, file.len, S(expected)), "<%s>", file.data);
    buf_clear(&file);
    env_file_format(&file, NULL, 0, NULL, 0);
    CHECK(check_same(file.data, file.len, S(HEADER)));
}

/* A file of `text`, read and written, is what it was to a shell that asks for `name`; or, with
 * `value`, has this in it. */
static void written_means(const char *text, const char *name, const char *value) {
    struct env_var list[LIST_MOST + 1];
    cleanup_buf struct buf vars = {0}, kept = {0}, file = {0};
    CHECK(!env_file_parse(text, strlen(text), gather, &vars, &kept));
    size_t count = sorted(list, &vars);
    env_file_format(&file, list, count, kept.data, kept.len);
    for (size_t i = 0; i < sizeof shells / sizeof *shells; i++) {
        path_write(text, strlen(text));
        cleanup_buf struct buf before = shell_value(shells[i], name);
        path_write(file.data, file.len);
        cleanup_buf struct buf after = shell_value(shells[i], name);
        const char *expected = value ? value : before.data;
        CHECK_SAID(expected && check_same(after.data, after.len, expected, strlen(expected)),
                   "%s in <%s> is <%s>, and was <%s>, in %s", name, file.data,
                   after.data ? after.data : "", before.data ? before.data : "", shells[i]);
    }
}

static void lines_of_others_see_the_variables(void) {
    static const char java[] = "export JAVA_HOME=/opt/java\n"
                               "export PATH=\"$JAVA_HOME/bin:$PATH\"\n"
                               "B2=$JAVA_HOME\nexport B3=$B2\nexport LAST=1\n";
    written_means(java, "PATH", NULL);
    written_means(java, "B2", "/opt/java");
    written_means(java, "B3", "/opt/java");
    written_means(java, "JAVA_HOME", "/opt/java");
    written_means("export Z=z\nA=$Z$Z\n", "A", "zz");
    written_means("export Z=z\n[ \"$Z\" = z ] || return 0\nexport A=\"$Z\"\n", "A", "z");
}

static void a_variable_wins_over_what_lines_of_others_do_to_it(void) {
    static const char *const lines[] = {
        "V=2",
        "export V=\"$V:2\"",
        "unset V",
        "export W=1 V=2$X",
        "for V in 1 2; do :; done",
        "read -r V <<E\n2\nE",
        "f() { V=2; }; f",
        "eval \"$(echo W | tr W V)=2\"",
        "v=$(echo W | tr W V); export $v=2",
        "v=$(echo W | tr W V); export \"$v\"=2",
        "unset `echo W | tr W V`",
        "f=$(mktemp); echo W=2 | tr W V >$f; . $f; rm $f",
        "export \\V=2$X",
        "export V''=2$X",
        "export V''V=$X V\\\n=2$X",
    };
    for (size_t i = 0; i < sizeof lines / sizeof *lines; i++) {
        cleanup_buf struct buf text = {0};
        buf_printf(&text, "export A=1\nexport V=ours\n%s\nexport Z=1\n", lines[i]);
        written_means(text.data, "V", "ours");
    }
    /* Only what is named is there once more. */
    struct env_var vars[] = {{S("A"), S("1")}, {S("AB"), S("2")}, {S("B"), S("3")}};
    cleanup_buf struct buf file = {0};
    env_file_format(&file, vars, 3, S("X=$AB:ABC A_\n"));
    static const char expected[] =
        HEADER "export A='1'\nexport AB='2'\nexport B='3'\nX=$AB:ABC A_\nexport AB='2'\n";
    CHECK_SAID(check_same(file.data, file.len, S(expected)), "<%s>", file.data);
}

static void quoting_survives_every_shell(void) {
    cleanup_buf struct buf bytes = {0}, large = {0};
    for (int i = 1; i < 256; i++)
        buf_append_char(&bytes, (char)i);
    for (int i = 255; i > 0; i--)
        buf_append_char(&bytes, (char)i);
    while (large.len < 100 * 1024)
        buf_append_str(&large, "0123456789 '\"\\\n");
    const struct env_var vars[] = {
        {S("V_BYTES"), bytes.data, bytes.len},
        {S("V_LARGE"), large.data, large.len},
        {S("V_EMPTY"), S("")},
        {S("V_NEWLINES"), S("\n\na\n\n")},
        {S("V_QUOTES"), S("'\"'''\"\"'")},
        {S("V_QUOTE"), S("'")},
        {S("V_EVIL"), S("x\nexport EVIL=1\nexport EVIL='1'\n'\nexport EVIL=1 #\n")},
        {S("V_REBOOT"), S("$(echo reboot)`echo reboot`$HOME ${HOME} ~ $((1+1)) !! * {a,b}")},
        {S("V_END"), S("\\")},
        {S("V_CR"), S("a\r\nb\r")},
        {S("V_COMMENT"), S("# no comment")},
        {S("V_HEREDOC"), S("<<EOF\nEOF\n")},
    };
    size_t count = sizeof vars / sizeof *vars;
    cleanup_buf struct buf file = {0}, expected = {0}, got = {0}, kept = {0};
    env_file_format(&file, vars, count, S("# a comment of others\n"));
    path_write(file.data, file.len);

    for (size_t i = 0; i < count; i++) {
        gather(&expected, &vars[i]);
        for (size_t j = 0; j < sizeof shells / sizeof *shells; j++) {
            cleanup_buf struct buf value = shell_value(shells[j], vars[i].name);
            CHECK_SAID(check_same(value.data, value.len, vars[i].value, vars[i].length),
                       "%s has another %s", shells[j], vars[i].name);
        }
    }
    for (size_t j = 0; j < sizeof shells / sizeof *shells; j++) {
        cleanup_buf struct buf evil = shell_value(shells[j], "EVIL");
        CHECK_SAID(!evil.len, "%s has EVIL", shells[j]);
    }
    CHECK(!env_file_parse(file.data, file.len, gather, &got, &kept));
    CHECK(check_same(got.data, got.len, expected.data, expected.len));
    CHECK(check_same(kept.data, kept.len, S("# a comment of others\n")));
}

/* Lines that hold V: the parser and the shells agree on it. */
static void what_is_read_is_what_shells_make_of_it(void) {
    static const char *const lines[] = {
        "export V=1 W='x y' X=\"a\\\"b\\$c\"",
        "export V=a\\ b'q'\"r\"",
        "export V=\"a\\\"b\\$c\\`d\\\\e\\f\\!g\"",
        "\t export \t V=1\t",
        "export V=1\\\n2",
        "exp\\\nort V\\\n=\\\n1",
        "export \\\n V='a\\\nb'",
        "export V=\"a\\\nb\nc\"",
        "export V=1 \\\n",
        "export V=1;",
        "export V=1; export W=2;export V=3 ;",
        "export V=1 V=2",
        "export V=1 # a comment 'that' \"does not\" \\",
        "export V=a#b",
        "export V=#b",
        "export V=1\r",
        "export V='1'\r\nexport W=1\r",
        "export V=",
        "export V=''\"\"",
        "export V==",
        "export V=a=b W=c",
        "export V=a~b~",
        "export V=a,~",
        "export V='~':\"~\"\\~",
        "export V=*?[a]",
        "export V={a}{},b",
        "export V={'a,b'}{c\\,d}",
        "export V=}a,b{",
        "export V=$",
        "export V=$,$.$/$:$%",
        "export V=\"$\"",
        "export V=\"a$ b$\nc$/$.$:$,$%$;\"",
        "export V=\\$HOME\\`\\~\\\"\\'\\#\\\\",
        "export V=!x!",
        "export V=^%@+-",
        "export V=\v\f\x01\x7f\x80\x81\x88\xa0\xff",
        "export V=\\\x81\\\x88\\\xff\"\\\x81\\\xff\"",
        "export V=1 # x\nexport W=1",
    };
    for (size_t i = 0; i < sizeof lines / sizeof *lines; i++) {
        cleanup_buf struct buf all = {0}, kept = {0};
        CHECK(!env_file_parse(lines[i], strlen(lines[i]), gather, &all, &kept));
        const char *value = NULL;
        for (size_t at = 0; at < all.len; at += strlen(all.data + at) + 1)
            if (!strncmp(all.data + at, "V=", 2))
                value = all.data + at + 2;
        CHECK_SAID(value, "not read: <%s>", lines[i]);
        path_write(lines[i], strlen(lines[i]));
        for (size_t j = 0; j < sizeof shells / sizeof *shells; j++) {
            cleanup_buf struct buf real = shell_value(shells[j], "V");
            CHECK_SAID(value && check_same(real.data, real.len, value, strlen(value)),
                       "<%s> is <%s>, but <%s> in %s", lines[i], value ? value : "",
                       real.data ? real.data : "", shells[j]);
        }
        formatted_again(lines[i], &all, &kept);
    }
}

static void lines_of_exports_are_taken(void) {
    READS("", "", "");
    READS("export A=1", "A=1\0", "");
    READS("export A=1 B='x y'\nexport C=\n", "A=1\0B=x y\0C=\0", "");
    READS("export A=1\nexport A=2\n", "A=1\0A=2\0", "");
    READS("export A=1 # why\n", "A=1\0", "# why\n");
    READS("export A=1;# why", "A=1\0", "# why\n");
    READS("export A=1 # Environment variables managed by vmsfs\n", "A=1\0", "");
    READS(HEADER "export A='1'\n", "A=1\0", "");
    READS(HEADER HEADER "export A='1'\n", "A=1\0", "");
    READS("#!/bin/sh\n# SmolVM managed environment variables\n\nexport APP=production\nexport "
          "Q='it'\"'\"'s'\n",
          "APP=production\0Q=it's\0", "# SmolVM managed environment variables\n\n");
}

static void other_lines_are_kept(void) {
    FOREIGN("\n");
    FOREIGN("# export A=1\n#\\\n");
    FOREIGN("A=1\nexport A\nexport\nexport -p\nunset A\n");
    FOREIGN("export A=$HOME\nexport A=\"$HOME\"\nexport A=$(id)\nexport A=`id`\nexport A=${B}\n");
    FOREIGN("export A=~\nexport A=x:~/bin\nexport A=\"\"~\nexport A={a,b}\nexport A={1..3}\n");
    FOREIGN("export A=1 B=$HOME\nexport A=1 B\nexport -- A=1\nexport \"A\"=1\nexport A\"=\"1\n");
    FOREIGN("export A+=1\nexport 1A=1\nexport A-B=1\nexport =1\nexport 'A=1'\nexport A\n");
    FOREIGN("export A=1 && export B=2\nexport A=1 || :\nexport A=1 | :\nexport A=1 &\n");
    FOREIGN("export A=1; B=2\nB=2; export A=1\nexport A=1 >x\nX=1 export A=1\n! export A=1\n");
    FOREIGN("exports A=1\nEXPORT A=1\n\\export A=1\n'export' A=1\ncommand export A=1\n");
    FOREIGN("export A=\"$\\\nHOME\"\nexport A=$\\\n(id)\n");
    READS("foo\nexport A=1\nbar", "A=1\0", "foo\nbar\n");
    READS("A=1\r\nexport B=1\r\n", "B=1\r\0", "A=1\r\n");
    READS("\xef\xbb\xbf"
          "export A=1\nexport B=2\n",
          "B=2\0",
          "\xef\xbb\xbf"
          "export A=1\n");
}

static void no_export_is_taken_out_of_another_command(void) {
    FOREIGN("A='x\nexport EVIL=1\n'\n");
    FOREIGN("echo \"x\nexport EVIL=1\n\" # \"\n");
    FOREIGN("echo \\\nexport EVIL=1\n");
    FOREIGN("true &&\nexport EVIL=1\n");
    FOREIGN("true |\n\n# x\nexport EVIL=1\n");
    FOREIGN("cat <<E\nexport EVIL=1\nE\n");
    FOREIGN("cat <<-'E' >/dev/null; echo\nexport EVIL=1\n E\n$(\n\t\tE\n");
    FOREIGN("cat <<\"A B\" <<\\C\nexport EVIL=1\nA B\nexport EVIL=1\nC\n");
    FOREIGN(
        "if true; then\nexport EVIL=1\nelif false\nthen export EVIL=1; else\nexport EVIL=1\nfi\n");
    FOREIGN("while false; do\nexport EVIL=1\ndone >x 2>&1\nuntil :\ndo\nexport EVIL=1\ndone\n");
    FOREIGN("for i in a b; do\nexport EVIL=1\ndone\nfor i\ndo\nexport EVIL=1\ndone\nfor i do :; "
            "done\n");
    FOREIGN("case $1 in\n(a|b) export EVIL=1\nexport EVIL=1;;\n*)\nexport EVIL=1\nesac\n");
    FOREIGN("case x in esac\ncase x in a) ;; b) esac\n");
    FOREIGN("f() {\nexport EVIL=1\n}\nf2()\n(\nexport EVIL=1\n)\n{\nexport EVIL=1\n}\n");
    FOREIGN("A=$(\nexport EVIL=1\ncase x in x) echo ')';; esac # )\n)\n");
    FOREIGN("A=\"$(echo \"\nexport EVIL=1\n\")${A:-${B}}$((1+(2)))`echo \"x\"`\"\n");
    FOREIGN("if { true; } then { ! false; } fi\n");
    READS("if true; then\nexport EVIL=1\nfi\nexport A=1\n", "A=1\0",
          "if true; then\nexport EVIL=1\nfi\n");
    READS("cat <<E\nexport EVIL=1\nE\nexport A=1\n", "A=1\0", "cat <<E\nexport EVIL=1\nE\n");
    READS("cat <<E; export A=1\nE\nexport A=1\n", "A=1\0", "cat <<E; export A=1\nE\n");
    READS("f() { :; }\nexport A=1\n", "A=1\0", "f() { :; }\n");
    READS("echo if; echo {\nexport A=1\n", "A=1\0", "echo if; echo {\n");
}

static void from_the_first_doubt_on_nothing_is_taken(void) {
    static const char *const doubtful[] = {
        "A='",
        "export A='1",
        "export A=\"1",
        "export A=1\\",
        "echo `'`",
        "export A=`",
        "echo $(",
        "echo ${",
        "cat <<E",
        "cat <<E\nE2",
        "if true; then",
        "f() {",
        "case x in",
        "foo \\",
        "foo \\\n",
        "fi",
        "}",
        ")",
        ";;",
        "a=(1 2)",
        "[[ a\n&& b ]]",
        "function f {",
        "((1))",
        "echo $'\\''",
        "i\\\nf true; then",
        "function\\\n f {",
        "cat <<E\n$(\nE",
        "cat <<E\nx\\\nE",
        "cat <<$E",
        "cat <<<'x",
    };
    for (size_t i = 0; i < sizeof doubtful / sizeof *doubtful; i++) {
        cleanup_buf struct buf text = {0}, vars = {0}, kept = {0}, file = {0};
        buf_printf(&text, "# x\nexport A=1\n%s", doubtful[i]);
        if (!strchr("\\\n", doubtful[i][strlen(doubtful[i]) - 1]))
            buf_append_str(&text, "\nexport EVIL=1\n");
        CHECK(!env_file_parse(text.data, text.len, gather, &vars, &kept));
        CHECK_SAID(check_same(vars.data, vars.len, S("A=1\0")), "<%s>", text.data);
        CHECK_SAID(kept.len > 4 && check_same(kept.data, 4, S("# x\n")) &&
                       check_same(kept.data + 4, kept.len - 4, text.data + 15, text.len - 15),
                   "kept <%s>", kept.data);
        formatted_again(text.data, &vars, &kept);

        /* The variables stand before it, where a shell still sees them. */
        struct env_var var = {S("A"), S("2")};
        env_file_format(&file, &var, 1, kept.data, kept.len);
        static const char expected[] = HEADER "export A='2'\n# x\n";
        CHECK_SAID(file.len > strlen(expected) && !memcmp(file.data, expected, strlen(expected)),
                   "written as <%s>", file.data);
    }
}

static void a_nul_ends_the_reading(void) {
    static const char text[] = "export A=1\n# x\n";
    static const char *const lines[] = {"export B='^'", "export B=1^", "export B=1 # ^", "^",
                                        "# ^",          "foo^",        "cat <<E\nE^"};
    for (size_t i = 0; i < sizeof lines / sizeof *lines; i++) {
        cleanup_buf struct buf all = {0}, vars = {0}, kept = {0};
        buf_printf(&all, "%s%s\nexport EVIL=1\n", text, lines[i]);
        *strchr(all.data, '^') = '\0';
        CHECK(!env_file_parse(all.data, all.len, gather, &vars, &kept));
        CHECK_SAID(check_same(vars.data, vars.len, S("A=1\0")), "<%s> is read", lines[i]);
        CHECK_SAID(check_same(kept.data, kept.len, all.data + 11, all.len - 11), "<%s>", lines[i]);
        formatted_again(lines[i], &vars, &kept);
    }
}

static void deep_nesting_is_doubt_and_no_crash(void) {
    const char *const nests[] = {"(", "{ ", "$(", "${a-", "if ", "\"$(", "while ", "f() { "};
    for (size_t i = 0; i < sizeof nests / sizeof *nests; i++) {
        cleanup_buf struct buf text = {0}, vars = {0}, kept = {0};
        for (int j = 0; j < 100000; j++)
            buf_append_str(&text, nests[i]);
        CHECK(!env_file_parse(text.data, text.len, gather, &vars, &kept));
        CHECK(!vars.len && check_same(kept.data, kept.len, text.data, text.len));
    }
}

static int refuse_second(void *arg, const struct env_var *var) {
    (void)var;
    int *calls = arg;
    return ++*calls == 2 ? -ECANCELED : 0;
}

static void the_callback_can_end_the_reading(void) {
    int calls = 0;
    cleanup_buf struct buf kept = {0};
    CHECK(env_file_parse(S("export A=1\nexport B=2 C=3\nexport D=4\n"), refuse_second, &calls,
                         &kept) == -ECANCELED);
    CHECK(calls == 2);
}

static void want_of_memory_is_told(void) {
    struct buf vars = {0}, kept = {.failed = -ENOMEM};
    CHECK(env_file_parse(S("foo\n"), gather, &vars, &kept) == -ENOMEM);
}

int main(void) {
    int fd = mkstemp(path);
    CHECK(fd >= 0 && !close(fd));
    names();
    a_written_file_looks_as_documented();
    lines_of_others_see_the_variables();
    a_variable_wins_over_what_lines_of_others_do_to_it();
    quoting_survives_every_shell();
    what_is_read_is_what_shells_make_of_it();
    lines_of_exports_are_taken();
    other_lines_are_kept();
    no_export_is_taken_out_of_another_command();
    from_the_first_doubt_on_nothing_is_taken();
    a_nul_ends_the_reading();
    deep_nesting_is_doubt_and_no_crash();
    the_callback_can_end_the_reading();
    want_of_memory_is_told();
    CHECK(!unlink(path));
    return check_end();
}
