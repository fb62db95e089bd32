/*
Shards, safetensors files and checkpoints that are damaged in every way a disk, a network or an editor can: cut off anywhere, any byte changed, headers
that lie. Each must be refused with one sentence and exit code 1, or read as what it says; never a crash, a hang or a silent misreading.

build and run: make test   (or dev/cpu's recipe on this file); the exit code is the verdict
*/

#include <string>
#include <sys/wait.h>
#define TESTING
#include "../../train_deit.cu"
#include "check.cuh"

static char path[64];

enum { SHARD, SAFETENSORS, WEIGHTS };

static Model* tiny; // the plan of a model of one block of 4 channels, for its tensors' names and shapes

// opens `bytes` as a file in another process: 0 accepted, 1 refused with one sentence, -1 anything else
static int open_in_child(int kind, const std::string& bytes) {
    char complaint[4096] = {0};
    int output[2];
    FILE* f = fopen(path, "wb");
    require(f != NULL && fwrite(bytes.data(), 1, bytes.size(), f) == bytes.size() && fclose(f) == 0 && pipe(output) == 0, "cannot write %s: %m", path);
    fflush(stdout);
    const pid_t child = fork();
    require(child >= 0, "cannot fork: %m");
    if (child == 0) {
        alarm(20);
        dup2(output[1], 2);
        if (kind == SHARD) {
            const Shard shard = shard_open(path);
            unsigned long sum = 0; // reads all that the index promises
            for (uint32_t i = 0; i < shard.header->images; i++) {
                const ShardEntry* e = &shard.entries[i];
                for (size_t j = 0; j < (size_t)e->height * e->width * shard.header->channels; j++) { sum += shard.file.data[e->offset + j]; }
            }
            _exit(sum == 1 ? 2 : 0);
        }
        const Safetensors* st = safetensors_open(path);
        if (kind == WEIGHTS) { check_parameters(tiny, st); }
        unsigned long sum = 0;
        for (const StTensor& t : st->tensors) {
            for (size_t j = 0; j < t.end - t.begin; j++) { sum += ((const uint8_t*)t.data)[j]; }
        }
        _exit(sum == 1 ? 2 : 0);
    }
    close(output[1]);
    size_t n = 0;
    for (ssize_t got; n < sizeof(complaint) - 1 && (got = read(output[0], complaint + n, sizeof(complaint) - 1 - n)) > 0; ) { n += (size_t)got; }
    close(output[0]);
    int status;
    waitpid(child, &status, 0);
    if (!WIFEXITED(status)) { return -1; }
    if (WEXITSTATUS(status) == 0) { return n == 0 ? 0 : -1; }
    // one sentence; of weights, a list of tensors before it
    const char* last = complaint;
    for (const char* p = complaint; p + 1 < complaint + n; p++) { if (*p == '\n') { last = p + 1; } }
    const bool listed = last == complaint || (kind == WEIGHTS && strstr(last, "do not fit") != NULL);
    return WEXITSTATUS(status) == 1 && listed && strncmp(last, "error: ", 7) == 0 && complaint[n-1] == '\n' ? 1 : -1;
}

template <class T> static void put(std::string& s, size_t at, T v) { s.replace(at, sizeof(T), (const char*)&v, sizeof(T)); }

static void seal(std::string& s, unsigned images) { // the checksum of header and index
    put(s, 124, crc_32(crc_32(0, s.data(), 124), s.data() + 128, images * 32));
}

static std::string make_shard(void) {
    const unsigned images = 5, side = 3, channels = 2, record = side * side * channels;
    std::string s(128 + images * 32 + images * record, '\0');
    s.replace(0, 8, "DROPIT\r\n");
    put(s, 8, 1u);
    put(s, 12, 128u);
    put(s, 16, (uint64_t)s.size());
    put(s, 24, images);
    put(s, 28, 4u);
    put(s, 32, channels);
    for (int c = 0; c < 4; c++) {
        put(s, 40 + 4 * c, 0.5f);
        put(s, 56 + 4 * c, 0.25f);
    }
    put(s, 72, (uint64_t)128);
    put(s, 80, (uint64_t)(128 + images * 32));
    for (unsigned i = 0; i < images; i++) {
        const size_t entry = 128 + i * 32, offset = 128 + images * 32 + i * record;
        for (unsigned j = 0; j < record; j++) { s[offset + j] = (char)(7 * i + j); }
        put(s, entry, (uint64_t)offset);
        put(s, entry + 8, side);
        put(s, entry + 12, side);
        put(s, entry + 16, i % 4);
        put(s, entry + 24, crc_32(0, s.data() + offset, record));
    }
    seal(s, images);
    return s;
}

static std::string make_safetensors(const std::string& header, size_t data) {
    std::string s(8, '\0');
    put(s, 0, (uint64_t)header.size());
    return s + header + std::string(data, '\1');
}

static void test_shards(void) {
    const std::string good = make_shard();
    check(open_in_child(SHARD, good) == 0, "a good shard is read");
    for (size_t n = 0; n < good.size(); n++) { check(open_in_child(SHARD, good.substr(0, n)) == 1, "shard cut off at byte %zu", n); }
    check(open_in_child(SHARD, good + "x") == 1, "shard with a byte too many");
    for (size_t i = 0; i < good.size(); i++) {
        std::string s = good;
        s[i] ^= (char)(1 << (i % 8));
        check(open_in_child(SHARD, s) == 1, "shard with a bit of byte %zu flipped", i);
    }
    // headers that lie under a right checksum
    const struct { const char* what; size_t at; uint64_t value; size_t bytes; } lies[] = {
        {"version 2", 8, 2, 4}, {"header bytes 64", 12, 64, 4}, {"file bytes", 16, ~0ull, 8}, {"no images", 24, 0, 4}, {"2^32-1 images", 24, 0xffffffff, 4},
        {"no classes", 28, 0, 4}, {"no channels", 32, 0, 4}, {"5 channels", 32, 5, 4}, {"task 2", 36, 2, 4}, {"mean NaN", 40, 0x7fc00000, 4},
        {"std 0", 56, 0, 4}, {"index offset", 72, 64, 8}, {"data offset", 80, 0, 8}, {"record before the data", 128, 0, 8},
        {"record behind the end", 128, ~0ull - 5, 8}, {"height 0", 136, 0, 4}, {"height 2^32-1", 136, 0xffffffff, 4}, {"width 65535", 140, 65535, 4},
        {"label 4 of 4", 144, 4, 4}, {"label -1", 144, 0xffffffff, 4}, {"annotation bytes", 148, 0xffffffff, 4}, {"record checksum", 152, 0, 4},
    };
    for (size_t i = 0; i < sizeof(lies) / sizeof(lies[0]); i++) {
        std::string s = good;
        s.replace(lies[i].at, lies[i].bytes, (const char*)&lies[i].value, lies[i].bytes);
        seal(s, 5);
        check(open_in_child(SHARD, s) == 1, "shard that claims %s", lies[i].what);
    }
}

static void test_safetensors(void) {
    const std::string header = "{\"__metadata__\":{\"format\":\"pt\",\"note\":\"a \\\"b\\\"\"},\"x\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]},"
                               "\"y.z\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[24,25]}}   ";
    const std::string good = make_safetensors(header, 25);
    check(open_in_child(SAFETENSORS, good) == 0, "a good safetensors file is read");
    check(open_in_child(SAFETENSORS, make_safetensors("{}", 0)) == 0, "a safetensors file without tensors is read");
    for (size_t n = 0; n < good.size(); n++) { check(open_in_child(SAFETENSORS, good.substr(0, n)) == 1, "safetensors cut off at byte %zu", n); }
    const char* const bad[] = { // each with 8 bytes of data
        "", "[]", "{", "{}x", "{\"a\":1}", "{\"a\":{}}", "{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,12]}}",                          // outside
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}",                           // data left over
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}",                           // a hole
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}", // overlap
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}", // twice
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,8]}}",                           // shape and bytes disagree
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,0]}}",                           // backwards
        "{\"a\":{\"dtype\":\"F31\",\"shape\":[2],\"data_offsets\":[0,8]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296,2],\"data_offsets\":[0,8]}}",     // a product beyond 2^64
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,99999999999999999999]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[-2],\"data_offsets\":[0,8]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[2.0],\"data_offsets\":[0,8]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8],\"more\":1}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,2],\"data_offsets\":[0,8]}}",
    };
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) { check(open_in_child(SAFETENSORS, make_safetensors(bad[i], 8)) == 1, "safetensors header %s", bad[i]); }
    for (int entries = 128; entries <= 129; entries++) {
        std::string list;
        for (int i = 0; i < entries; i++) { list += (i ? ",\"" : "\"") + std::to_string(i) + "\":\"\""; }
        check(open_in_child(SAFETENSORS, make_safetensors("{\"__metadata__\":{" + list + "}}", 0)) == (entries > 128), "%d metadata entries", entries);
    }
    check(open_in_child(SAFETENSORS, make_safetensors("{\"" + std::string(5000, 'a') + "\":{}}", 8)) == 1, "a name of 5,000 characters");
    for (unsigned i = 0; i < 1000; i++) { // up to three bytes changed
        std::string s = good;
        const uint4 u = philox(21, 95, 0, i);
        s[u.x % s.size()] = (char)(u.w & 255);
        if (i % 3 > 0) { s[u.y % s.size()] = (char)(u.w >> 8 & 255); }
        if (i % 3 > 1) { s[u.z % s.size()] = (char)(u.w >> 16 & 255); }
        const int result = open_in_child(SAFETENSORS, s);
        check(result == 0 || result == 1, "safetensors with changes at %zu %zu %zu", u.x % s.size(), u.y % s.size(), u.z % s.size());
    }
}

// a file of our own has a checksum: a change is refused
static void test_checkpoints(void) {
    const float x[3] = {1.0f, -2.0f, 3.0f}, y[1] = {4.0f};
    StTensor tensors[] = {{"a.weight", "F32", {3, 1}, 0, 0, 2, x}, {"a.bias", "F32", {}, 0, 0, 0, y}};
    StMetadata metadata[] = {{"step", "7"}, {"run", "0123abcd"}};
    safetensors_write(path, {metadata, 2}, {tensors, 2});
    check(checkpoint_file_whole(path), "a written file is whole");
    Safetensors* st = safetensors_open(path);
    const std::string good((const char*)st->file.data, st->file.bytes);
    const StTensor *a = safetensors_find(st, "a.weight"), *b = safetensors_find(st, "a.bias");
    check(a != NULL && a->dims == 2 && a->shape[0] == 3 && a->shape[1] == 1 && memcmp(a->data, x, sizeof(x)) == 0, "a tensor comes back");
    check(b != NULL && b->dims == 0 && memcmp(b->data, y, sizeof(y)) == 0, "a scalar comes back");
    check(strcmp(safetensors_metadata(st, "step"), "7") == 0 && safetensors_metadata(st, "none") == NULL, "metadata come back");
    safetensors_close(st);
    check(!checkpoint_file_whole("/nowhere") && !checkpoint_file_whole("/tmp"), "what is not there is not whole");
    for (size_t n = 0; n < good.size(); n += 3) {
        check(open_in_child(SAFETENSORS, good.substr(0, n)) == 1 && !checkpoint_file_whole(path), "checkpoint cut off at byte %zu", n);
    }
    const size_t tensors_at = good.find("\"a.weight\"");
    for (unsigned i = 0; i < 1000; i++) {
        std::string s = good;
        const uint4 u = philox(22, 95, 0, i);
        s[u.x % s.size()] = (char)(u.w & 255);
        if (i % 3 > 0) { s[u.y % s.size()] = (char)(u.w >> 8 & 255); }
        if (i % 3 > 1) { s[u.z % s.size()] ^= (char)(1 << (u.w >> 16 & 7)); }
        // where both the word crc32 and the word run are hit, a file of the same tensors may be read; a resume wants it whole
        const int result = open_in_child(SAFETENSORS, s);
        const bool same = s.compare(tensors_at, std::string::npos, good, tensors_at, std::string::npos) == 0;
        check((result == 1 || (result == 0 && same)) && checkpoint_file_whole(path) == (s == good), "checkpoint with changes at %zu %zu %zu",
              u.x % s.size(), u.y % s.size(), u.z % s.size());
    }
}

// weights of the tiny model, but for what `change` says: NULL, or "NAME DTYPE SHAPE" instead of the model's tensor or in addition, or
// "NAME none". `classes`: of the head. Data are zeros
static std::string make_weights(const char* change, size_t classes) {
    std::string header = "{";
    size_t offset = 0;
    char instead[96] = "", dtype[8] = "", shape[64] = "";
    if (change != NULL) { sscanf(change, "%95s %7s %63s", instead, dtype, shape); }
    bool changed = false;
    for (int i = 0; i <= tiny->parameters.n; i++) {
        const Parameter* s = &tiny->parameters.of[i < tiny->parameters.n ? i : 0];
        std::string name = s->name, type = "F32", dims;
        size_t n = 1;
        for (int d = 0; d < s->dims; d++) {
            const size_t side = d == 0 && name.find("head.") == 0 ? classes : s->shape[d];
            dims += (d ? "," : "") + std::to_string(side);
            n *= side;
        }
        const bool last = i == tiny->parameters.n; // a tensor that the model does not have
        if (last && (changed || change == NULL)) { break; }
        if (last || name == instead) {
            changed = true;
            if (strcmp(dtype, "none") == 0) { continue; }
            name = instead;
            type = dtype;
            dims = shape;
            n = 1;
            for (const char* p = shape; *p != 0; p = strchr(p, ',') ? strchr(p, ',') + 1 : "") { n *= strtoul(p, NULL, 10); }
        }
        const size_t bytes = n * (type == "F64" ? 8 : type == "F32" || type == "I32" ? 4 : type == "U8" ? 1 : 2);
        header += (header.size() > 1 ? ",\"" : "\"") + name + "\":{\"dtype\":\"" + type + "\",\"shape\":[" + dims + "],\"data_offsets\":["
                + std::to_string(offset) + "," + std::to_string(offset + bytes) + "]}";
        offset += bytes;
    }
    return make_safetensors(header + "}", 0) + std::string(offset, '\0');
}

// weights that fit, and that do not; then any change of their headers: read or refused, never a crash
static void test_weights(void) {
    tiny = model_new();
    tiny->config = {6, 3, 2, 3, 4, 1, 2};
    tiny->B = 1;
    tiny->H = tiny->W = 6;
    tiny->CH = 2;
    tiny->V = 3;
    tiny->adamw = true;
    tiny->chunk_bytes = 1 << 20;
    deit_shape(tiny);
    tiny->augment = augment_new("none");
    plan_model(tiny); // image 6, patch 3, 2 channels, 3 classes, 4 channels, 1 block, 2 heads: T is 5
    const struct { const char* change; int result; size_t classes = 3; } cases[] = {
        {NULL, 0}, {"norm.weight F16 4", 1}, {"norm.weight BF16 4", 1}, {"norm.weight F64 4", 1}, {"norm.weight I32 4", 1}, {"norm.weight F32 5", 1},
        {"norm.weight F32 2,2", 1}, {"norm.weight none", 1}, {"norm.scale F32 4", 1}, {"pos_embed F32 1,5,4", 0}, {"pos_embed F32 1,2,4", 1}, {"pos_embed F16 1,10,4", 1},
        {"pos_embed U8 1,10,4", 1}, {"pos_embed F32 1,6,4", 1}, {"pos_embed F32 1,1,4", 1}, {"pos_embed F32 1,0,4", 1}, {"pos_embed F32 1,10,5", 1},
        {"pos_embed F32 2,10,4", 1}, {"pos_embed F32 10,4", 1}, {"pos_embed F32 1,257,4", 1}, {"pos_embed F32 1,99999999999,0", 1},
        {"head.weight F32 7,4", 1}, {"head.bias F32 7", 1}, {"head.bias none", 1}, {"dist_token F32 1,1,4", 1}, {"head_dist.weight F32 3,4", 1},
        {NULL, 1, 7}, {"head.weight BF16 3,4", 1}, {"head.weight F32 7,5", 1, 7}, {"head.weight none", 1, 7},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        const int result = open_in_child(WEIGHTS, make_weights(cases[i].change, cases[i].classes));
        check(result == cases[i].result, "weights of %zu classes with %s: %d, expected %d", cases[i].classes, cases[i].change ? cases[i].change : "no change", result, cases[i].result);
    }
    const std::string good = make_weights(NULL, 3);
    const size_t header = good.find("}}") + 2;
    for (unsigned i = 0; i < 1000; i++) { // digits, names and types of the header, up to three bytes
        std::string s = good;
        const uint4 u = philox(23, 95, 0, i);
        const char to[] = "0123456789,:[]{}\"FBU";
        s[8 + u.x % (header - 8)] = to[u.w % 20];
        if (i % 3 > 0) { s[8 + u.y % (header - 8)] = to[(u.w >> 8) % 20]; }
        if (i % 3 > 1) { s[8 + u.z % (header - 8)] ^= (char)(1 << (u.w >> 16 & 7)); }
        const int result = open_in_child(WEIGHTS, s);
        check(result == 0 || result == 1, "weights with changes at %zu %zu %zu", 8 + u.x % (header - 8), 8 + u.y % (header - 8), 8 + u.z % (header - 8));
    }
}

int main(void) {
    snprintf(path, sizeof(path), "/tmp/test_files.%d", (int)getpid());
    check(open_in_child(SHARD, "") == 1 && open_in_child(SAFETENSORS, "") == 1, "empty files");
    test_shards();
    test_safetensors();
    test_checkpoints();
    test_weights();
    unlink(path);
    printf("%d passed, %d failed\n", passed, failed);
    return failed == 0 && passed > 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
