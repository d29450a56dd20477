// The buffer without Python, for the thread and address sanitizers. Prints "ok" and exits 0, or says what broke.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "buffer.hpp"

using namespace saefast;

#define CHECK(condition)                                                        \
    do {                                                                        \
        if (!(condition)) {                                                     \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            std::exit(1);                                                       \
        }                                                                       \
    } while (0)

namespace {

constexpr int64_t kBatch = 32, kLag = 4, kPrefetch = 3, kCapacity = 256;

// Files whose row r is the numbers (r, r + 1/2) as doubles, in two columns: of one file, or of a file each.
std::vector<Shard> write_shards(const std::string& folder, const std::vector<int64_t>& rows, bool apart = false) {
    std::vector<Shard> shards;
    double row = 0;
    for (size_t s = 0; s < rows.size(); ++s) {
        const std::string path = folder + "/" + std::to_string(s), beside = path + ".beside";
        std::ofstream file(path, std::ios::binary);
        std::vector<double> first, second;
        for (int64_t r = 0; r < rows[s]; ++r, ++row) {
            first.push_back(row);
            second.push_back(row + 0.5);
        }
        const auto bytes = static_cast<std::streamsize>(rows[s] * 8);
        file.write("header", 6);
        file.write(reinterpret_cast<char*>(first.data()), bytes);
        if (apart)
            std::ofstream(beside, std::ios::binary).write(reinterpret_cast<char*>(second.data()), bytes);
        else
            file.write(reinterpret_cast<char*>(second.data()), bytes);
        shards.push_back({rows[s], {{path, 6}, apart ? Column{beside, 0} : Column{path, 6 + rows[s] * 8}}});
    }
    return shards;
}

struct Run {
    std::vector<double> reservoir = std::vector<double>(kCapacity * 2, -1), ring = std::vector<double>(kPrefetch * kBatch * 2, -1);
    std::unique_ptr<Buffer> buffer;
    Run(std::shared_ptr<RowSource> source, std::vector<int64_t> rows, int threads, int64_t epochs, int64_t first = 0,
        int consumers = 1) {
        buffer = std::make_unique<Buffer>(
            std::move(source), Planner(std::move(rows), kCapacity, kBatch, kLag, epochs, 7),
            reinterpret_cast<char*>(reservoir.data()), reinterpret_cast<char*>(ring.data()),
            Buffer::Settings{16, kCapacity, kBatch, kLag, kPrefetch, threads, consumers, first});
    }
    std::vector<double> next(int consumer = 0) {
        Batch batch;
        while (!buffer->next(consumer, 1000, batch)) {
        }
        const double* data = ring.data() + batch.place * kBatch * 2;
        std::vector<double> out;
        for (int64_t i = 0; i < batch.n_rows; ++i) {
            CHECK(data[2 * i + 1] == data[2 * i] + 0.5);
            out.push_back(data[2 * i]);
        }
        if (batch.n_rows) {
            const auto rows = buffer->rows(batch.place);
            for (int64_t i = 0; i < batch.n_rows; ++i) CHECK(static_cast<double>(rows[static_cast<size_t>(i)]) == out[static_cast<size_t>(i)]);
        }
        return out;
    }
    std::vector<double> all() {
        std::vector<double> out;
        for (auto batch = next(); !batch.empty(); batch = next()) out.insert(out.end(), batch.begin(), batch.end());
        return out;
    }
};

void each_row_once_an_epoch(const std::vector<Shard>& shards, const std::vector<int64_t>& rows, int64_t total) {
    std::vector<double> first;
    for (int threads : {1, 2, 5}) {
        Run run(std::make_shared<FileSource>(shards, std::vector<int64_t>{8, 8}), rows, threads, 3);
        const auto drawn = run.all();
        CHECK(static_cast<int64_t>(drawn.size()) == 3 * total);
        for (int64_t epoch = 0; epoch < 3; ++epoch) {
            std::map<double, int> seen;
            for (int64_t i = 0; i < total; ++i) ++seen[drawn[static_cast<size_t>(epoch * total + i)]];
            CHECK(static_cast<int64_t>(seen.size()) == total);
        }
        if (first.empty()) first = drawn;
        CHECK(drawn == first);  // whatever the number of threads
    }
    for (int64_t start : {1, 2, 7, 20}) {
        if (start * kBatch > 3 * total) continue;
        Run run(std::make_shared<FileSource>(shards, std::vector<int64_t>{8, 8}), rows, 2, 3, start);
        CHECK(run.all() == std::vector<double>(first.begin() + start * kBatch, first.end()));
    }
}

void consumers_see_the_same(const std::vector<Shard>& shards, const std::vector<int64_t>& rows) {
    Run run(std::make_shared<FileSource>(shards, std::vector<int64_t>{8, 8}), rows, 3, 0, 0, 3);
    std::vector<std::vector<double>> drawn(3);
    std::vector<std::thread> readers;
    for (int c = 0; c < 3; ++c)
        readers.emplace_back([&run, &drawn, c] {
            for (int i = 0; i < 200; ++i) {
                const auto batch = run.next(c);
                drawn[static_cast<size_t>(c)].insert(drawn[static_cast<size_t>(c)].end(), batch.begin(), batch.end());
            }
        });
    for (auto& reader : readers) reader.join();
    CHECK(drawn[0] == drawn[1]);
    CHECK(drawn[0] == drawn[2]);
}

void live_rows_all_arrive(int64_t total, int threads) {
    auto queue = std::make_shared<QueueSource>(16, 100);
    Run run(queue, {Planner::kUnknown}, threads, 1);
    std::thread producer([&] {
        for (int64_t row = 0; row < total;) {
            std::vector<double> block;
            for (int64_t i = 0; i < 37 && row < total; ++i, ++row) {
                block.push_back(static_cast<double>(row));
                block.push_back(static_cast<double>(row) + 0.5);
            }
            while (!queue->push(reinterpret_cast<char*>(block.data()), static_cast<int64_t>(block.size() / 2), 50)) {
            }
        }
        queue->finish("");
    });
    std::map<double, int> seen;
    for (double row : run.all()) ++seen[row];
    producer.join();
    CHECK(static_cast<int64_t>(seen.size()) == total);
    for (const auto& [row, count] : seen) CHECK(count == 1);
}

void errors_reach_the_reader(const std::string& folder) {
    auto shards = write_shards(folder, {500});
    shards[0].rows = 600;  // the file ends before that
    Run run(std::make_shared<FileSource>(shards, std::vector<int64_t>{8, 8}), {600}, 2, 1);
    try {
        run.all();
        CHECK(!"a short file must throw");
    } catch (const std::runtime_error& error) {
        CHECK(std::string(error.what()).find(shards[0].columns[0].path + ": ends at byte") == 0);
    }
    auto queue = std::make_shared<QueueSource>(16, 100);
    Run live(queue, {Planner::kUnknown}, 2, 1);
    queue->finish("the model broke");
    try {
        live.all();
        CHECK(!"a failed producer must throw");
    } catch (const std::runtime_error& error) {
        CHECK(std::string(error.what()) == "the model broke");
    }
}

void closes_in_any_state(const std::vector<Shard>& shards, const std::vector<int64_t>& rows) {
    for (int draws = 0; draws < 20; ++draws) {
        Run run(std::make_shared<FileSource>(shards, std::vector<int64_t>{8, 8}), rows, 3, 0);
        for (int i = 0; i < draws; ++i) run.next();
    }
    auto queue = std::make_shared<QueueSource>(16, 100);
    Run waiting(queue, {Planner::kUnknown}, 3, 1);  // nobody ever pushes
}

}  // namespace

int main(int, char** argv) {
    const std::string folder = argv[1];
    const std::vector<int64_t> rows{300, 1, 0, 450, 77};
    const auto shards = write_shards(folder, rows);
    each_row_once_an_epoch(shards, rows, 828);
    each_row_once_an_epoch(write_shards(folder, {50}), {50}, 50);  // several epochs lie in the reservoir at once
    each_row_once_an_epoch(write_shards(folder, {50, 70}, true), {50, 70}, 120);
    write_shards(folder, rows);
    consumers_see_the_same(shards, rows);
    for (int64_t total : {0, 1, 100, 255, 256, 257, 1000, 3000})
        for (int threads : {1, 3}) live_rows_all_arrive(total, threads);
    closes_in_any_state(shards, rows);
    errors_reach_the_reader(folder);
    std::puts("ok");
}
